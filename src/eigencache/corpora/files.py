"""A file, a folder or a glob becomes a text; what is left out of it is counted, never silent."""

import glob
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePath

from eigencache.corpora.plain import NotTextError, read_plain
from eigencache.corpora.text import Document, Text, abridged
from eigencache.errors import CorpusError

FileReader = Callable[[Path, str], Iterator[Document]]
FORMATS: dict[str, FileReader] = {}  # suffix in lower case -> reader; every other file is read as plain text


def file_format(*suffixes: str) -> Callable[[FileReader], FileReader]:
    """Register a reader `(path, title) -> documents` for files of these suffixes, alone, in folders and in globs."""

    def register(read: FileReader) -> FileReader:
        FORMATS.update(dict.fromkeys(suffixes, read))
        return read

    return register


def read_file(path: Path, title: str) -> Iterator[Document]:
    """The documents of one file, read by the reader of its suffix."""
    return FORMATS.get(path.suffix.lower(), read_plain)(path, title)


def read_path(spec: str) -> Text | None:
    """The text of a file, of a folder or of a glob; None where the spec is none of them.

    An existing path comes before a glob, so that a file called `a[1].txt` can be read.
    Raises `CorpusError` for a path that exists and cannot be read as text.
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
        raise CorpusError(f"{spec}: neither a file nor a folder but a pipe or device: write the text to a file first")
    return Text.scan(name_of(spec), lambda: read_file(path, path.name))


def read_folder(folder: Path, name: str) -> Text:
    """All text files below a folder, sorted by path; hidden and binary entries are skipped and counted in `notes`.

    Linked folders are not followed. Raises `CorpusError` where no text file is left.
    """

    def refuse(error: OSError) -> None:
        raise CorpusError(f"{error.filename}: cannot be read ({error.strerror}): check its permissions") from error

    found: list[Path] = []
    hidden = 0
    for parent, folders, files in os.walk(folder, onerror=refuse):
        hidden += sum(entry.startswith(".") for entry in (*folders, *files))
        folders[:] = [entry for entry in folders if not entry.startswith(".")]
        found += [Path(parent, entry) for entry in files if not entry.startswith(".")]
    titled = sorted((path.relative_to(folder).as_posix(), path) for path in found)
    return _read_many(name, titled, hidden)


def read_glob(pattern: str) -> Text:
    """All text files that match, each once and sorted by path; `**` reaches into folders, hidden names do not match.

    Binary files are skipped and counted in `notes`. Raises `CorpusError` where nothing matches or no text file is left.
    """
    matches = glob.glob(os.path.expanduser(pattern), recursive=True)  # noqa: PTH111, PTH207 (Path.glob: no absolute pattern)
    paths = sorted({match for match in matches if not Path(match).is_dir()})
    if not paths:
        raise CorpusError(f"{abridged(pattern)}: no file matches this pattern: check it, and keep it in quotes")
    return _read_many(name_of(pattern), [(name_of(path), Path(path)) for path in paths], hidden=0)


def name_of(spec: str) -> str:
    """The spec as a name that betrays no machine: an absolute one is cut to its last fixed part and what follows.

    `/data/a.txt` becomes `a.txt`, `/data/docs/**/*.md` becomes `docs/**/*.md`, `notes/a.txt` stays.
    """
    path = PurePath(spec)
    if not path.is_absolute():
        return spec
    parts = path.parts[1:]
    first = next((i for i, part in enumerate(parts) if glob.has_magic(part)), len(parts))
    return "/".join(parts[max(0, first - 1) :]) or spec


def _mode(path: Path) -> int | None:
    """The file mode; None where there is no such path, or the spec cannot be one."""
    try:
        return path.stat().st_mode
    except PermissionError as error:
        raise CorpusError(f"{path}: cannot be read ({error.strerror}): check the permissions of its folder") from error
    except (OSError, ValueError):  # not there, a name too long, a loop of links
        return None


def _is_text(path: Path) -> bool:
    """Whether a file can be decoded to its end."""
    if not path.is_file():
        return False
    try:
        for _ in read_plain(path, path.name):
            pass
    except NotTextError:
        return False
    return True


def _read_many(name: str, titled: Sequence[tuple[str, Path]], hidden: int) -> Text:
    kept = [(title, path) for title, path in titled if _is_text(path)]
    skipped = {"hidden": hidden, "not UTF-8 text": len(titled) - len(kept)}
    counts = ", ".join(f"{count:,} {what}" for what, count in skipped.items() if count)
    if not kept:
        raise CorpusError(f"{name}: no text file in it (skipped: {counts or 'nothing'}): name files of UTF-8 text")
    notes = [f"{name}: {len(kept):,} files read, skipped: {counts}"] if counts else []
    return Text.scan(name, lambda: (document for title, path in kept for document in read_file(path, title)), notes)
