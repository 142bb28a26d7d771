"""Texts from files, folders and globs; skipped files are counted in the notes of the text."""

import glob
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePath

from eigencache.corpora.plain import NotTextError, read_plain
from eigencache.corpora.text import Document, Text
from eigencache.errors import CorpusError

FileReader = Callable[[Path, str], Iterator[Document]]
FORMATS: dict[str, FileReader] = {}  # suffix in lower case -> reader; every other file is read as plain text
PATH_USAGE = 'a file, a folder, a quoted glob such as "docs/**/*.md", a .jsonl file with a field "text"'


def file_format(*suffixes: str) -> Callable[[FileReader], FileReader]:
    """Register a reader `(path, title) -> documents` for all files with one of the given suffixes."""

    def register(read: FileReader) -> FileReader:
        FORMATS.update(dict.fromkeys(suffixes, read))
        return read

    return register


def read_file(path: Path, title: str) -> Iterator[Document]:
    """Return the documents of one file, read by the reader of its suffix.

    Args:
        path: The file.
        title: Title of its documents.
    """
    return FORMATS.get(path.suffix.lower(), read_plain)(path, title)


def read_path(spec: str) -> Text | None:
    """Return the text of a file, a folder or a glob; None where the specification is none of these.

    An existing path takes precedence over a glob, so that a file named `a[1].txt` can be read.

    Raises:
        CorpusError: The path exists and cannot be read as text.
    """
    if not spec.strip() or "\0" in spec:
        return None
    path = Path(os.path.expanduser(spec))  # noqa: PTH111 (Path.expanduser raises for a user that does not exist)
    mode = _mode(path)
    if mode is None:
        return read_glob(spec) if glob.has_magic(spec) else None
    if stat.S_ISDIR(mode):
        return read_folder(path, name_of(spec))
    if not stat.S_ISREG(mode):
        raise CorpusError(f"{spec}: is a pipe or device, not a file or folder: write the text to a file first")
    return Text.scan(name_of(spec), lambda: read_file(path, path.name))


def read_folder(folder: Path, name: str) -> Text:
    """Return all text files below a folder, sorted by path.

    Hidden and binary files are skipped and counted in `notes`. Links to folders are not followed.

    Args:
        folder: The folder.
        name: Name of the text.

    Raises:
        CorpusError: A folder cannot be read, or no text file remains.
    """

    def refuse(error: OSError) -> None:
        raise CorpusError(f"{error.filename}: cannot be read ({error.strerror}): check its permissions") from error

    paths: list[Path] = []
    hidden = 0
    for parent, folders, files in os.walk(folder, onerror=refuse):
        hidden += sum(entry.startswith(".") for entry in (*folders, *files))
        folders[:] = [entry for entry in folders if not entry.startswith(".")]
        paths += [Path(parent, entry) for entry in files if not entry.startswith(".")]
    titled = sorted((path.relative_to(folder).as_posix(), path) for path in paths)
    return _read_many(name, titled, hidden)


def read_glob(pattern: str) -> Text:
    """Return all text files that match a pattern, sorted by path.

    `**` matches folders recursively; hidden names do not match. Binary files are skipped and counted in `notes`.

    Raises:
        CorpusError: Nothing matches, or no text file remains.
    """
    matches = glob.glob(os.path.expanduser(pattern), recursive=True)  # noqa: PTH111, PTH207 (Path.glob: no absolute pattern)
    paths = sorted({match for match in matches if not Path(match).is_dir()})
    if not paths:
        raise CorpusError(f"{abridged(pattern)}: no file matches this pattern: check it, and put it in quotes")
    return _read_many(name_of(pattern), [(name_of(path), Path(path)) for path in paths], hidden=0)


def abridged(spec: str, limit: int = 120) -> str:
    """Return a specification as one line for an error, quoted if it is blank or not printable.

    Args:
        spec: The specification that the user gave.
        limit: Maximum number of characters; a longer line ends in an ellipsis.
    """
    shown = spec if spec.isprintable() and spec.strip() else repr(spec)
    return shown if len(shown) <= limit else shown[: limit - 1] + "…"


def name_of(spec: str) -> str:
    """Return a name of the text without absolute paths: an absolute path is cut to its last fixed part and its pattern.

    `/data/a.txt` becomes `a.txt`, `/data/docs/**/*.md` becomes `docs/**/*.md`, `notes/a.txt` is unchanged.
    """
    path = PurePath(spec)
    if not path.is_absolute():
        return spec
    parts = path.parts[1:]
    first = next((i for i, part in enumerate(parts) if glob.has_magic(part)), len(parts))
    return "/".join(parts[max(0, first - 1) :]) or spec


def _mode(path: Path) -> int | None:
    """Return the mode of a file; None where the path does not exist or is not a valid path."""
    try:
        return path.stat().st_mode
    except PermissionError as error:
        raise CorpusError(f"{path}: cannot be read ({error.strerror}): check the permissions of its folder") from error
    except (OSError, ValueError):  # no such file, a name that is too long, a loop of links
        return None


def _is_text(path: Path) -> bool:
    """Return whether the whole file is text."""
    if not path.is_file():
        return False
    try:
        for _ in read_plain(path, path.name):
            pass
    except NotTextError:
        return False
    return True


def _read_many(name: str, titled: Sequence[tuple[str, Path]], hidden: int) -> Text:
    """Return the text of files (title, path), and count the skipped ones."""
    kept = [(title, path) for title, path in titled if _is_text(path)]
    skipped = {"hidden": hidden, "not UTF-8 text": len(titled) - len(kept)}
    counts = ", ".join(f"{count:,} {what}" for what, count in skipped.items() if count)
    if not kept:
        raise CorpusError(f"{name}: contains no text file (skipped: {counts or 'nothing'}): give files of UTF-8 text")
    notes = [f"{name}: {len(kept):,} files read, skipped: {counts}"] if counts else []
    return Text.scan(name, lambda: (document for title, path in kept for document in read_file(path, title)), notes)
