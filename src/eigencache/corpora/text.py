"""A `Text`, titled documents with a content hash, and the registry of named corpora."""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, Self

from eigencache.errors import CorpusError


class Document(NamedTuple):
    """One document, or one piece of a long document; all pieces but the first are `continued`."""

    title: str
    text: str
    continued: bool = False  # the text continues the document before it without a separator


class Documents:
    """Documents that are read again at every iteration, so that no corpus must fit into memory; blank ones are dropped.

    Args:
        start: Begins a new iteration over the documents each time it is called.
    """

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
    """Documents in a fixed order, which can be iterated any number of times."""

    name: str  # the canonical specification, such as `stdlib:calibration`; never an absolute path
    documents: Iterable[Document]
    sha256: str  # of the contents in order; titles and storage format do not enter
    notes: tuple[str, ...] = ()  # one sentence for each kind of skipped files

    @classmethod
    def scan(cls, name: str, start: Callable[[], Iterable[Document]], notes: Iterable[str] = ()) -> Self:
        """Create a text after reading every document once, so that its hash is known and every defect raised at once.

        Memory: one document.

        Args:
            name: Name of the text.
            start: Begins a new iteration over the documents each time it is called.
            notes: Sentences on skipped files.

        Raises:
            CorpusError: All documents are blank. Errors of `start` are passed on.
        """
        documents = Documents(start)
        digest = content_hash(documents)
        if digest is None:
            raise CorpusError(f"{name}: the text is empty or only whitespace: give a text with words")
        return cls(name, documents, digest, tuple(notes))


def content_hash(documents: Iterable[Document]) -> str | None:
    """Return the SHA-256 of documents in UTF-8, separated by a byte 0xFF, which UTF-8 cannot contain.

    The hash of a single document equals the `sha256sum` of its file (without a byte order mark). The pieces of a document
    have the hash of the whole.

    Args:
        documents: Documents in order.

    Returns:
        The hash in hexadecimal; None without documents.
    """
    digest, empty = hashlib.sha256(), True
    for document in documents:
        if not empty and not document.continued:
            digest.update(b"\xff")
        digest.update(document.text.encode())
        empty = False
    return None if empty else digest.hexdigest()


class NamedCorpus(NamedTuple):
    """A registered corpus: the form of its specifications, and their reader."""

    usage: str
    read: Callable[[str], Text]


CORPORA: dict[str, NamedCorpus] = {}


def corpus(word: str, usage: str) -> Callable[[Callable[[str], Text]], Callable[[str], Text]]:
    """Register a reader for the specifications `WORD` and `WORD:REST`.

    Args:
        word: Name of the corpus.
        usage: Form of its specifications, for errors and help.

    Returns:
        A decorator for the reader, which is called with REST (an empty string for `WORD`).
    """

    def register(read: Callable[[str], Text]) -> Callable[[str], Text]:
        CORPORA[word] = NamedCorpus(usage, read)
        return read

    return register
