"""Texts from plain files, read in pieces; a file that is not UTF-8 text is refused."""

import codecs
import re
from collections.abc import Iterator
from pathlib import Path

from eigencache.corpora.text import Document
from eigencache.errors import CorpusError

PIECE_CHARS = 2**18  # about 65,000 tokens: enough for most runs, at little memory
_CUT_WITHIN = 2**14  # characters before the end of a piece in which a line end is searched
_LINE_END = re.compile(r"(?<=\S)\r?\n(?=\S)")


class NotTextError(CorpusError):
    """The bytes of a file are not UTF-8 text."""


def read_plain(path: Path, title: str) -> Iterator[Document]:
    """Yield the whole text of a file as one document, in pieces if it is longer than `PIECE_CHARS`.

    A byte order mark is removed, line ends are unchanged. Memory: one piece, for any size of the file.

    Args:
        path: The file.
        title: Title of the document.

    Raises:
        NotTextError: The file has a NUL byte or is not UTF-8; the message has the offset of the byte.
        CorpusError: The file cannot be read.
    """
    pending, continued = "", False
    for chunk in _decoded(path):
        pending += chunk
        while len(pending) > PIECE_CHARS:
            cut = cut_before(pending, PIECE_CHARS)
            yield Document(title, pending[:cut], continued)
            pending, continued = pending[cut:], True
    if pending:
        yield Document(title, pending, continued)


def cut_before(text: str, limit: int) -> int:
    """Return a position in (0, limit] at which byte-level tokenizers split the text anyway, if there is one near the limit.

    The first choice is after a line end between two characters that are not whitespace: the patterns of GPT-2, Llama 3 and
    Qwen split there. The second choice is before the last blank, so that ` word` is not split. Otherwise it is the limit.

    Args:
        text: Text of more than `limit` characters.
        limit: Maximum position.
    """
    start = max(0, limit - _CUT_WITHIN)
    ends = [match.end() for match in _LINE_END.finditer(text, start, limit + 1)]
    if ends:
        return ends[-1]
    blank = text.rfind(" ", start + 1, limit)
    return blank if blank > 0 else limit


def _decoded(path: Path) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8")()
    offset = 0  # of the first byte that is not decoded yet
    try:
        with path.open("rb") as file:
            while True:
                chunk = file.read(PIECE_CHARS)
                if (nul := chunk.find(b"\0")) >= 0:
                    where = file.tell() - len(chunk) + nul
                    raise NotTextError(f"{path}: is a binary file (NUL byte at offset {where:,}): pass a text file")
                text = decoder.decode(chunk, final=not chunk)
                yield text.removeprefix("\ufeff") if offset == 0 else text
                if not chunk:
                    return
                offset = file.tell() - len(decoder.getstate()[0])
    except UnicodeDecodeError as error:
        where = offset + error.start
        byte = f"byte 0x{error.object[error.start]:02x} at offset {where:,}"
        convert = f"convert it first, for example with: iconv -f LATIN1 -t UTF-8 {path.name}"
        raise NotTextError(f"{path}: not UTF-8 ({byte}): {convert}") from error
    except OSError as error:
        raise CorpusError(f"{path}: cannot be read ({error.strerror}): check the file and its permissions") from error
