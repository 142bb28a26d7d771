"""Compile C sources once for this machine, keep the library in the user's cache folder, and load it from there.

A library is loaded only if its size and SHA-256 equal those recorded when it was built. A folder or file that another user
owns or can write is refused: whoever can write a library can run code in this process.
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
_MESSAGE = 400  # most characters of a compiler's message


class CompilationError(Exception):
    """A library can be neither found nor built. The message gives the reason, worded to follow a colon."""


def load(sources: Sequence[Path], flags: Sequence[str], libraries: Sequence[str]) -> ctypes.CDLL:
    """Load a library, building it first if it is missing or damaged.

    The compiler is the command in the environment variable CC, or the first of cc, gcc and clang. The file name contains the
    compiler and a hash of sources, flags and libraries.

    Args:
        sources: C files; the first is compiled and includes the others.
        flags: options of the compiler that precede the source.
        libraries: options of the compiler that follow the source.

    Raises:
        CompilationError: the library cannot be built, or must not be loaded.
    """
    try:
        digest = sha256(b"".join(source.read_bytes() for source in sources) + repr((*flags, *libraries)).encode())
        folder, stem = _folder(), f"{sources[0].stem}-{digest.hexdigest()[:16]}"
        compiler = _compiler()
        library = (
            folder / f"{stem}-{Path(compiler[0]).name}.so"
            if compiler
            else next(iter(sorted(folder.glob(f"{stem}-*.so"))), None)
        )
        if library is None:
            raise CompilationError("there is no C compiler: install gcc, or set the environment variable CC")
        if not _intact(library):
            if not compiler:
                raise CompilationError(
                    f"{library} is damaged, and there is no C compiler to build it again: install gcc, or set the "
                    "environment variable CC"
                )
            _build(library, compiler, sources[0], flags, libraries)
        return ctypes.CDLL(str(library))
    except OSError as error:
        raise CompilationError(str(error)) from error


def _folder() -> Path:
    """Return the cache folder of the package, created if needed, which no other user can write."""
    root = os.environ.get("XDG_CACHE_HOME")
    if not root:
        try:
            root = Path.home() / ".cache"
        except RuntimeError as error:
            raise CompilationError(
                "there is no home folder: set the environment variable XDG_CACHE_HOME to a cache folder"
            ) from error
    folder = Path(root) / "eigencache"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    _require_private(folder)
    return folder


def _require_private(path: Path) -> None:
    """Raise `CompilationError` if another user owns a file or folder or can write it."""
    if not hasattr(os, "getuid"):
        return
    status = path.stat()
    if status.st_uid != os.getuid():
        raise CompilationError(f"{path} belongs to another user: remove it, or set XDG_CACHE_HOME to another cache folder")
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise CompilationError(
            f"{path} can be written by other users: run chmod go-w on it, or set XDG_CACHE_HOME to another cache folder"
        )


def _compiler() -> list[str]:
    """Return the command of the compiler with its options; empty if there is no compiler."""
    if command := os.environ.get("CC"):
        return shlex.split(command)
    return [path for name in _COMPILERS if (path := shutil.which(name))][:1]


def _intact(library: Path) -> bool:
    """Return whether a library is unchanged since it was built. Raises `CompilationError` if another user can write it."""
    note = _note_of(library)
    if not (library.is_file() and note.is_file()):
        return False
    _require_private(library)
    _require_private(note)
    return note.read_text(encoding="ascii", errors="replace") == _size_and_hash(library)


def _note_of(library: Path) -> Path:
    """Return the file with the recorded size and hash of a library."""
    return library.with_suffix(".sha256")


def _size_and_hash(library: Path) -> str:
    """Return the size and SHA-256 of a library as the text of its note."""
    data = library.read_bytes()
    return f"{len(data)} {sha256(data).hexdigest()}\n"


def _build(library: Path, compiler: list[str], source: Path, flags: Sequence[str], libraries: Sequence[str]) -> None:
    """Compile into a temporary folder and move the library to its place, as another process may build the same library."""
    _LOG.warning("compiling the kernels of the live cache for this CPU; this happens once")
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        built, note = Path(folder, library.name), Path(folder, "note")
        command = [*compiler, *flags, "-o", str(built), str(source), *libraries]
        result = subprocess.run(command, capture_output=True, text=True, errors="replace")
        if result.returncode or not built.is_file():
            message = (
                " ".join(result.stderr.split())[:_MESSAGE] or f"exit code {result.returncode}, and no library was written"
            )
            raise CompilationError(f"{shlex.join(compiler)}: {message}")
        note.write_text(_size_and_hash(built), encoding="ascii")
        for path in (built, note):
            path.chmod(0o700)
        built.replace(library)
        note.replace(_note_of(library))
