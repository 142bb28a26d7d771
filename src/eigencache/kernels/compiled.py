"""C sources compiled once for this machine and kept in the user's cache folder; only what was built there is loaded.

A library is loaded after its size and SHA-256 have been compared with what was written down when it was built. A folder or
file that others own or can write is refused: whoever can write a library decides what this process does.
"""

import ctypes
import logging
import os
import shlex
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path

_LOG = logging.getLogger(__name__)
_COMPILERS = ("cc", "gcc", "clang")
_WORDS = 400  # characters of what a compiler says


class CompilationError(Exception):
    """A library can be neither found nor built; the message says why, in words that follow a colon."""


def load(sources: Sequence[Path], flags: Sequence[str], libraries: Sequence[str]) -> ctypes.CDLL:
    """The library of `sources`, of which the first is compiled and the others are included.

    It is built where it is missing or damaged, by `CC` or the first of cc, gcc and clang. Its name carries the compiler and
    a hash of sources, flags and libraries. Raises `CompilationError` where it cannot be built, or must not be loaded.
    """
    try:
        digest = sha256(b"".join(source.read_bytes() for source in sources) + repr((*flags, *libraries)).encode())
        folder, stem = _folder(), f"{sources[0].stem}-{digest.hexdigest()[:16]}"
        compiler = _compiler()
        kept = (
            folder / f"{stem}-{Path(compiler[0]).name}.so"
            if compiler
            else next(iter(sorted(folder.glob(f"{stem}-*.so"))), None)
        )
        if kept is None:
            raise CompilationError("there is no C compiler: install gcc, or name one in the environment variable CC")
        if not _intact(kept):
            if not compiler:
                raise CompilationError(f"{kept} is damaged, and there is no C compiler to build it again")
            _build(kept, compiler, sources[0], flags, libraries)
        return ctypes.CDLL(str(kept))
    except OSError as error:
        raise CompilationError(str(error)) from error


def _folder() -> Path:
    """The cache folder of the package, made if need be, that nobody else can write."""
    root = os.environ.get("XDG_CACHE_HOME")
    if not root:
        try:
            root = Path.home() / ".cache"
        except RuntimeError as error:
            raise CompilationError("there is no home folder: name a cache folder in XDG_CACHE_HOME") from error
    folder = Path(root) / "eigencache"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    _require_own(folder)
    return folder


def _require_own(path: Path) -> None:
    if not hasattr(os, "getuid"):
        return
    found = path.stat()
    if found.st_uid != os.getuid():
        raise CompilationError(f"{path} belongs to another user: remove it, or name another cache folder in XDG_CACHE_HOME")
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise CompilationError(
            f"{path} can be written by others: run chmod go-w on it, or name another one in XDG_CACHE_HOME"
        )


def _compiler() -> list[str]:
    """The command that compiles, with its own options; nothing where there is none."""
    named = os.environ.get("CC")
    if named:
        return shlex.split(named)
    return [found for name in _COMPILERS if (found := shutil.which(name))][:1]


def _intact(library: Path) -> bool:
    """Whether a library is the one that was built. Raises `CompilationError` for one that others can write."""
    note = _note_of(library)
    if not (library.is_file() and note.is_file()):
        return False
    _require_own(library)
    _require_own(note)
    return note.read_text(encoding="ascii", errors="replace") == _described(library)


def _note_of(library: Path) -> Path:
    return library.with_suffix(".sha256")


def _described(library: Path) -> str:
    data = library.read_bytes()
    return f"{len(data)} {sha256(data).hexdigest()}\n"


def _build(library: Path, compiler: list[str], source: Path, flags: Sequence[str], libraries: Sequence[str]) -> None:
    """Compile into a temporary folder and put the library in its place; others may be building the same."""
    _LOG.warning("compiling the kernels of the live cache for this CPU, once")
    with tempfile.TemporaryDirectory(dir=library.parent) as own:
        built, note = Path(own, library.name), Path(own, "note")
        command = [*compiler, *flags, "-o", str(built), str(source), *libraries]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace")
        if done.returncode or not built.is_file():
            said = " ".join(done.stderr.split())[:_WORDS] or f"it ended with code {done.returncode} and wrote no library"
            raise CompilationError(f"{shlex.join(compiler)}: {said}")
        note.write_text(_described(built), encoding="ascii")
        for path in (built, note):
            path.chmod(0o700)
        built.replace(library)
        note.replace(_note_of(library))
