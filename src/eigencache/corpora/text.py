"""A `--text` spec becomes a `Text` of titled documents with a content hash, or one clear `CorpusError`."""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, Self

from eigencache.errors import CorpusError

PATH_USAGE = 'a file, a folder, a quoted glob such as "docs/**/*.md", a .jsonl file with a field "text"'


class Document(NamedTuple):
    """One text without break; a long one may come as several pieces, all but the first `continued`."""

    title: str
    text: str
    continued: bool = False  # the text goes on where the document before it stopped: nothing belongs between them


class Documents:
    """Documents that are read afresh at every iteration, so no corpus has to fit into memory; blank ones are dropped."""

    def __init__(self, start: Callable[[], Iterable[Document]]) -> None:
        self._start = start

    def __iter__(self) -> Iterator[Document]:
        dropped = False
        for document in self._start():
            continued = document.continued and not dropped
            dropped = not continued and not document.text.strip()
            if not dropped:
                yield document._replace(continued=continued)


@dataclass(frozen=True)
class Text:
    """What a spec names: documents in a fixed order, that can be iterated any number of times."""

    name: str  # the canonical spec, such as `stdlib:calibration`; never an absolute path
    documents: Iterable[Document]
    sha256: str  # of the documents' contents in order; titles and the way of storing them do not enter
    notes: tuple[str, ...] = ()  # what was left out, one sentence each

    @classmethod
    def scan(cls, name: str, start: Callable[[], Iterable[Document]], notes: Iterable[str] = ()) -> Self:
        """Read every document once: the hash is known, and every defect raised, before anything else is done.

        `start` begins a new iteration each time it is called. Raises `CorpusError` where no document holds
        anything but whitespace, and whatever `start` raises. Memory: one document.
        """
        documents = Documents(start)
        digest = content_hash(documents)
        if digest is None:
            raise CorpusError(f"{name}: no text in it, it is empty or only whitespace: give a text with words in it")
        return cls(name, documents, digest, tuple(notes))


def content_hash(documents: Iterable[Document]) -> str | None:
    """SHA-256 of the documents in UTF-8 with a byte 0xFF between them, which UTF-8 cannot contain; None without any.

    The hash of a single document is thus the one `sha256sum` prints for its file (byte order mark aside), and
    pieces of a document hash as the whole.
    """
    digest, empty = hashlib.sha256(), True
    for document in documents:
        if not empty and not document.continued:
            digest.update(b"\xff")
        digest.update(document.text.encode())
        empty = False
    return None if empty else digest.hexdigest()


class NamedCorpus(NamedTuple):
    """A registered name: how its specs are written, and what reads them."""

    usage: str
    read: Callable[[str], Text]


CORPORA: dict[str, NamedCorpus] = {}


def corpus(word: str, usage: str) -> Callable[[Callable[[str], Text]], Callable[[str], Text]]:
    """Register a reader for the specs `WORD` and `WORD:REST`; it is called with REST ('' without one)."""

    def register(read: Callable[[str], Text]) -> Callable[[str], Text]:
        CORPORA[word] = NamedCorpus(usage, read)
        return read

    return register


def abridged(spec: str, limit: int = 120) -> str:
    """A spec in one line of at most `limit` characters, quoted where it would vanish or break the line."""
    shown = spec if spec.isprintable() and spec.strip() else repr(spec)
    return shown if len(shown) <= limit else shown[: limit - 1] + "…"
