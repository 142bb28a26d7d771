import json

import pytest

from eigencache.corpora.resolve import read_text
from eigencache.corpora.text import Document
from eigencache.errors import CorpusError


@pytest.mark.parametrize("suffix", [".jsonl", ".ndjson", ".JSONL"])
def test_a_line_is_a_document(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    first = json.dumps({"text": "one\nline\u2028more", "id": 7}, ensure_ascii=False)
    path.write_bytes(f'\ufeff{first}\n\n{{"text": ""}}\r\n{{"text": "two"}}'.encode())
    name = path.name
    assert list(read_text(str(path)).documents) == [
        Document(f"{name}:1", "one\nline\u2028more"),
        Document(f"{name}:4", "two"),
    ]


@pytest.mark.parametrize(
    ("line", "defect"),
    [
        (b"{text: 1}", r"not JSON \(.* at column 2\)"),
        (b'["text"]', "a list instead of an object"),
        (b"3", "a number instead of an object"),
        (b'{"content": "a", "id": 1}', r"""no field "text" \(its fields: 'content', 'id'\)"""),
        (b"{}", r'no field "text" \(its fields: none\)'),
        (b'{"text": null}', 'field "text" is null, a string is required'),
        (b'{"text": ["a"]}', 'field "text" is a list'),
        (b'{"text": true}', 'field "text" is a boolean'),
        (b'{"text": "\\ud800"}', 'field "text" contains half of a surrogate pair'),
        (b'{"text": "\xe9"}', "not UTF-8 .byte 0xe9"),
        (b"[" * 200_000, "JSON that cannot be parsed"),
        (b'{"text": ' + b"9" * 5000 + b"}", "JSON that cannot be parsed"),
    ],
)
def test_a_bad_line_is_refused_with_its_number(tmp_path, line, defect):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b'{"text": "good"}\n\n' + line + b"\n")
    with pytest.raises(CorpusError, match=rf"bad\.jsonl, line 3: {defect}"):
        read_text(str(path))


def test_a_file_without_permission_is_refused_by_name(tmp_path, monkeypatch):
    path = tmp_path / "secret.jsonl"
    path.write_text("{}")

    def refuse(*_args, **_kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(type(path), "open", refuse)
    with pytest.raises(CorpusError, match=r"secret\.jsonl: cannot be read \(Permission denied\)"):
        read_text(str(path))
