"""The running Python's standard library as a corpus: a held-out module is never a calibration module.

The split goes by a hash of the module's path below the standard library, so it is the same on every
machine and for every Python version. The bundled models were trained with this very split: what is
`held-out` here, none of them has seen. Test suites, character tables and generated topics are left out.
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
    """One module path in ten is `held-out`, the others are `calibration`, decided by the path alone.

    `relative_path` is written with forward slashes, relative to the standard library (`json/decoder.py`).
    """
    digest = hashlib.sha1(relative_path.encode(), usedforsecurity=False).hexdigest()
    return SPLITS[1] if int(digest, 16) % HELD_OUT_ONE_IN == 0 else SPLITS[0]


def module_paths(split: str, root: Path | None = None) -> list[tuple[str, Path]]:
    """The modules of one split as (relative path, file), always in the same order: that of their path's hash.

    Hash order mixes packages, so that the first N tokens are not all of `asyncio`. Raises `CorpusError`
    when this Python has no standard library on disk as `.py` files.
    """
    if split not in SPLITS:
        raise CorpusError(f"stdlib has no split {split!r}: use stdlib:{SPLITS[0]} or stdlib:{SPLITS[1]}")
    root = root or Path(sysconfig.get_path("stdlib"))
    found = []
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if name not in _LEFT_OUT]
        for name in files:
            path = Path(folder, name)
            relative = path.relative_to(root).as_posix()
            if path.suffix == ".py" and split_of(relative) == split:
                found.append((relative, path))
    if not found:
        raise CorpusError(f"no standard library modules as .py files below {root}: pass `text` FILE instead")
    return sorted(found, key=lambda item: hashlib.sha1(item[0].encode(), usedforsecurity=False).digest())


@corpus("stdlib", f"stdlib[:{'|:'.join(SPLITS)}]")
def read_stdlib(split: str) -> Text:
    """`stdlib` is its calibration split; each module is one document."""
    split = split or SPLITS[0]
    modules = module_paths(split)
    return Text.scan(f"stdlib:{split}", lambda: _documents(modules))


def _documents(modules: list[tuple[str, Path]]) -> Iterator[Document]:
    for title, path in modules:
        try:
            yield Document(title, path.read_text(encoding="utf8", errors="ignore"))
        except OSError as error:
            raise CorpusError(f"{path}: cannot be read ({error.strerror}): pass `text` FILE instead") from error
