"""A plain text file becomes documents piece by piece, and a file that is not UTF-8 text is refused by name."""

import codecs
import re
from collections.abc import Iterator
from pathlib import Path

from eigencache.corpora.text import Document
from eigencache.errors import CorpusError

PIECE_CHARS = 2**18  # about 65,000 tokens: enough for most runs, and little to hold in memory
_CUT_WITHIN = 2**14  # a line end is looked for in so many last characters of a piece
_LINE_END = re.compile(r"(?<=\S)\r?\n(?=\S)")


class NotTextError(CorpusError):
    """The bytes of a file are not UTF-8 text."""


def read_plain(path: Path, title: str) -> Iterator[Document]:
    """Yield the file's text without losing a character: as one document, in pieces where it is longer than `PIECE_CHARS`.

    A byte order mark is dropped, line ends stay as they are. Memory: one piece, whatever the size of the file.
    Raises `NotTextError` with the file and the offset of the first byte that is not UTF-8, or of a NUL byte;
    `CorpusError` where the file cannot be read.
    """
    held, continued = "", False
    for chunk in _decoded(path):
        held += chunk
        while len(held) > PIECE_CHARS:
            cut = cut_before(held, PIECE_CHARS)
            yield Document(title, held[:cut], continued)
            held, continued = held[cut:], True
    if held:
        yield Document(title, held, continued)


def cut_before(text: str, limit: int) -> int:
    """A position in (0, limit] where byte-level tokenizers break anyway, if the text offers one near the limit.

    Best after a line end between two characters that are not whitespace: GPT-2's, Llama 3's and Qwen's patterns
    all split there. Otherwise before the last blank, so that ` word` stays whole; in a text without blanks at the limit.
    """
    start = max(0, limit - _CUT_WITHIN)
    ends = [match.end() for match in _LINE_END.finditer(text, start, limit + 1)]
    if ends:
        return ends[-1]
    blank = text.rfind(" ", start + 1, limit)
    return blank if blank > 0 else limit


def _decoded(path: Path) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8")()
    offset = 0  # of the first byte that has not been decoded yet
    try:
        with path.open("rb") as file:
            while True:
                chunk = file.read(PIECE_CHARS)
                if (nul := chunk.find(b"\0")) >= 0:
                    where = file.tell() - len(chunk) + nul
                    raise NotTextError(f"{path}: a binary file (NUL byte at offset {where:,}): pass a file of text")
                text = decoder.decode(chunk, final=not chunk)
                yield text.removeprefix("\ufeff") if offset == 0 else text
                if not chunk:
                    return
                offset = file.tell() - len(decoder.getstate()[0])
    except UnicodeDecodeError as error:
        where = offset + error.start
        byte = f"byte 0x{error.object[error.start]:02x} at offset {where:,}"
        convert = f"convert it first, for instance with: iconv -f LATIN1 -t UTF-8 {path.name}"
        raise NotTextError(f"{path}: not UTF-8 ({byte}): {convert}") from error
    except OSError as error:
        raise CorpusError(f"{path}: cannot be read ({error.strerror}): check the file and its permissions") from error
