import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eigencache.corpora import plain
from eigencache.corpora.plain import NotTextError, cut_before, read_plain
from eigencache.corpora.resolve import read_text
from eigencache.corpora.text import content_hash
from eigencache.errors import CorpusError


@pytest.fixture
def small_pieces(monkeypatch):
    monkeypatch.setattr(plain, "PIECE_CHARS", 16)
    monkeypatch.setattr(plain, "_CUT_WITHIN", 8)


@pytest.mark.parametrize("content", ["a", "a\r\nb\r\n", "ünï" * 40, "a b c d\n" * 30, "x" * 100, "\n" * 50 + "a", "😀" * 33])
def test_a_file_is_read_without_losing_a_character(tmp_path, small_pieces, content):
    path = tmp_path / "a.txt"
    path.write_bytes(content.encode())
    pieces = list(read_plain(path, "title"))
    assert "".join(piece.text for piece in pieces) == content
    assert all(0 < len(piece.text) <= 16 and piece.title == "title" for piece in pieces)
    assert [piece.continued for piece in pieces] == [False] + [True] * (len(pieces) - 1)
    assert content_hash(pieces) == hashlib.sha256(path.read_bytes()).hexdigest()


@given(st.text(alphabet="ab \n\r", min_size=2, max_size=60), st.data())
def test_a_cut_lies_within_the_limit(text, data):
    limit = data.draw(st.integers(1, len(text) - 1))
    assert 0 < cut_before(text, limit) <= limit


def test_a_cut_is_made_after_a_line_end_or_else_before_a_blank_or_else_at_the_limit():
    assert cut_before("one two\nthree four", 16) == len("one two\n")
    assert cut_before("one two\n  three four", 18) == len("one two\n  three")
    assert cut_before("one_two_three_four", 5) == 5


def test_a_cut_after_a_line_end_leaves_the_tokens_as_they_are(tokenizer):
    whole = "the cache holds keys.\nthe model has\nread values, so far\n" * 3
    cut = cut_before(whole, len(whole) - 5)
    ids = [tokenizer([part], add_special_tokens=False)["input_ids"][0] for part in (whole, whole[:cut], whole[cut:])]
    assert whole[cut - 1] == "\n"
    assert ids[0] == ids[1] + ids[2]


def test_a_byte_order_mark_is_dropped(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeffwords".encode())
    assert [d.text for d in read_text(str(path)).documents] == ["words"]


@pytest.mark.parametrize(
    ("content", "defect"),
    [
        ("café".encode("latin-1"), "byte 0xe9 at offset 3"),
        (b"a" * 40 + b"\xff" + b"b" * 40, "byte 0xff at offset 40"),
        ("ü".encode() * 20 + b"\xc3", "byte 0xc3 at offset 40"),
        ("words".encode("utf-16"), "byte 0xff at offset 0|NUL byte"),
    ],
)
def test_a_file_that_is_not_utf8_is_refused_with_file_and_offset(tmp_path, small_pieces, content, defect):
    path = tmp_path / "bad.txt"
    path.write_bytes(content)
    with pytest.raises(NotTextError, match=rf"bad\.txt: .*({defect})"):
        read_text(str(path))


def test_a_binary_file_is_refused_with_file_and_offset(tmp_path, small_pieces):
    path = tmp_path / "a.bin"
    path.write_bytes(b"a" * 20 + b"\0")
    with pytest.raises(NotTextError, match=r"a\.bin: is a binary file \(NUL byte at offset 20\): pass a text file"):
        read_text(str(path))


def test_a_file_without_permission_is_refused_by_name(tmp_path, monkeypatch):
    path = tmp_path / "secret.txt"
    path.write_text("words")

    def refuse(*_args, **_kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(type(path), "open", refuse)
    with pytest.raises(CorpusError, match=r"secret\.txt: cannot be read \(Permission denied\): check"):
        read_text(str(path))
