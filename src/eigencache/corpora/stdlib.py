"""The standard library of the running Python as a corpus, divided into a calibration split and a held-out split.

A hash of the path of a module below the standard library determines its split, so the split is the same on every machine
and for every version of Python. The bundled models were trained on the calibration split only. Test suites, character
tables and generated topics are excluded.
"""

import hashlib
import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from eigencache.corpora.text import Document, Text, corpus
from eigencache.errors import CorpusError

SPLITS = ("calibration", "held-out")
HELD_OUT_ONE_IN = 10
_LEFT_OUT = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "lib2to3", "encodings", "idlelib", "pydoc_data", "turtledemo"}
)


def split_of(relative_path: str) -> str:
    """Return the split of a module: `held-out` for one path in ten, otherwise `calibration`.

    Args:
        relative_path: Path relative to the standard library, with forward slashes (`json/decoder.py`).
    """
    digest = hashlib.sha1(relative_path.encode(), usedforsecurity=False).hexdigest()
    return SPLITS[1] if int(digest, 16) % HELD_OUT_ONE_IN == 0 else SPLITS[0]


def module_paths(split: str, root: Path | None = None) -> list[tuple[str, Path]]:
    """Return the modules of a split as (relative path, file), in the order of a hash of their path.

    This order mixes packages, so that the first tokens do not all come from `asyncio`.

    Args:
        split: `calibration` or `held-out`.
        root: Folder of the standard library; default: that of the running Python.

    Raises:
        CorpusError: The split does not exist, or the standard library is not on disk as `.py` files.
    """
    if split not in SPLITS:
        raise CorpusError(f"stdlib has no split {split!r}: use stdlib:{SPLITS[0]} or stdlib:{SPLITS[1]}")
    root = root or Path(sysconfig.get_path("stdlib"))
    modules = []
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if name not in _LEFT_OUT]
        for name in files:
            path = Path(folder, name)
            relative = path.relative_to(root).as_posix()
            if path.suffix == ".py" and split_of(relative) == split:
                modules.append((relative, path))
    if not modules:
        raise CorpusError(f"{root}: contains no module of the standard library as a .py file: pass a file as `text` instead")
    return sorted(modules, key=lambda item: hashlib.sha1(item[0].encode(), usedforsecurity=False).digest())


@corpus("stdlib", f"stdlib[:{'|:'.join(SPLITS)}]")
def read_stdlib(split: str) -> Text:
    """Read a split of the standard library, each module as one document; default: `calibration`."""
    split = split or SPLITS[0]
    modules = module_paths(split)
    return Text.scan(f"stdlib:{split}", lambda: _documents(modules))


def _documents(modules: list[tuple[str, Path]]) -> Iterator[Document]:
    for title, path in modules:
        try:
            yield Document(title, path.read_text(encoding="utf8", errors="ignore"))
        except OSError as error:
            raise CorpusError(f"{path}: cannot be read ({error.strerror}): pass a file as `text` instead") from error
