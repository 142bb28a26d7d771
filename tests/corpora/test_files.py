import os

import pytest

from eigencache.corpora import files
from eigencache.corpora.files import file_format, name_of
from eigencache.corpora.resolve import read_text
from eigencache.corpora.text import Document
from eigencache.errors import CorpusError


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    contents = {
        "docs/b.md": b"bee",
        "docs/a/z.txt": b"zed",
        "docs/a/rows.jsonl": b'{"text": "row"}\n',
        "docs/empty.py": b"",
        "docs/image.png": b"\x89PNG\0\0",
        "docs/latin.txt": "café".encode("latin-1"),
        "docs/.hidden.txt": b"hidden",
        "docs/.git/config": b"hidden",
        "docs/.git/head": b"hidden",
    }
    for name, content in contents.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    return tmp_path / "docs"


def texts(spec):
    return [(document.title, document.text) for document in read_text(str(spec)).documents]


def test_a_folder_is_all_its_text_files_sorted_by_path(folder):
    assert texts(folder) == [("a/rows.jsonl:1", "row"), ("a/z.txt", "zed"), ("b.md", "bee")]


def test_what_is_left_out_of_a_folder_is_counted(folder):
    assert read_text("docs").notes == ("docs: 4 files read, skipped: 2 hidden, 2 not UTF-8 text",)
    assert read_text("docs/a").notes == ()


def test_a_linked_folder_is_not_followed_and_a_dangling_link_is_skipped(folder):
    (folder / "a" / "up").symlink_to(folder)
    (folder / "a" / "gone.txt").symlink_to(folder / "nothing")
    text = read_text("docs/a")
    assert [document.title for document in text.documents] == ["rows.jsonl:1", "z.txt"]
    assert text.notes == ("docs/a: 2 files read, skipped: 1 not UTF-8 text",)


def test_a_glob_is_all_matching_text_files_sorted_by_path_each_once(folder):
    assert texts("docs/**/*.*") == [("docs/a/rows.jsonl:1", "row"), ("docs/a/z.txt", "zed"), ("docs/b.md", "bee")]
    assert texts("docs/**/**/*.txt") == [("docs/a/z.txt", "zed")]
    assert texts(folder / "?.md") == [("b.md", "bee")]
    assert read_text("docs/*.*").notes == ("docs/*.*: 2 files read, skipped: 2 not UTF-8 text",)


def test_an_existing_file_comes_before_a_glob(folder):
    (folder / "c[1].txt").write_text("brackets")
    (folder / "c1.txt").write_text("matched")
    assert texts("docs/c[1].txt") == [("c[1].txt", "brackets")]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("docs/*.rst", r"^docs/\*\.rst: no file matches this pattern"),
        ("docs/*.png", r"^docs/\*\.png: contains no text file \(skipped: 1 not UTF-8 text\)"),
        ("docs/a/*", r"^docs/a/rows\.jsonl, line 1: no field"),
        ("docs/a", r"^docs/a/rows\.jsonl, line 1: no field"),
        ("bare", r"^bare: contains no text file \(skipped: 1 hidden\)"),
    ],
)
def test_a_folder_or_glob_without_readable_text_is_refused_by_name(folder, spec, message):
    (folder / "a" / "rows.jsonl").write_text("{}")
    (folder.parent / "bare").mkdir()
    (folder.parent / "bare" / ".env").touch()
    with pytest.raises(CorpusError, match=message):
        read_text(spec)


def test_a_pipe_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CorpusError, match=r"pipe: is a pipe or device"):
        read_text(str(tmp_path / "pipe"))


def test_a_folder_that_cannot_be_listed_is_refused_and_not_skipped(folder, monkeypatch):
    def walk(top, onerror):
        onerror(PermissionError(13, "Permission denied", f"{top}/locked"))
        return iter(())

    monkeypatch.setattr(files.os, "walk", walk)
    with pytest.raises(CorpusError, match=r"docs/locked: cannot be read \(Permission denied\)"):
        read_text("docs")


def test_a_path_that_cannot_be_looked_at_is_refused_by_name(tmp_path, monkeypatch):
    def refuse(*_args, **_kwargs):
        raise PermissionError(13, "Permission denied")

    path = tmp_path / "locked" / "a.txt"
    monkeypatch.setattr(type(path), "stat", refuse)
    with pytest.raises(CorpusError, match=r"a\.txt: cannot be read \(Permission denied\)"):
        read_text(str(path))


@pytest.mark.parametrize(
    ("spec", "name"),
    [
        ("notes/a.txt", "notes/a.txt"),
        ("/data/someone/a.txt", "a.txt"),
        ("/data/docs/", "docs"),
        ("/data/docs/**/*.md", "docs/**/*.md"),
        ("/*.md", "*.md"),
        ("~/a.txt", "~/a.txt"),
    ],
)
def test_a_name_betrays_no_machine(spec, name):
    assert name_of(spec) == name


def test_the_same_contents_hash_alike_whatever_the_spec(folder):
    (folder / "a" / "rows.jsonl").unlink()
    assert read_text("docs").sha256 == read_text(str(folder)).sha256 == read_text("docs/**/*.*").sha256


def test_registering_a_suffix_is_all_that_a_new_format_needs(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "FORMATS", dict(files.FORMATS))

    @file_format(".upper")
    def read_upper(path, title):
        yield Document(title, path.read_text().upper())

    (tmp_path / "a.upper").write_text("words")
    assert texts(tmp_path / "a.upper") == texts(tmp_path) == [("a.upper", "WORDS")]
