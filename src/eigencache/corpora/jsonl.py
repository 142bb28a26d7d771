"""Texts from JSONL files: the field `text` of every line is one document; an invalid line is refused with its number."""

import json
from collections.abc import Iterator
from pathlib import Path

from eigencache.corpora.files import file_format
from eigencache.corpora.text import Document
from eigencache.errors import CorpusError

FIELD = "text"


@file_format(".jsonl", ".ndjson")
def read_jsonl(path: Path, title: str) -> Iterator[Document]:
    """Yield one document for each line that is not blank. Memory: one line.

    Args:
        path: The file.
        title: Its title; documents are titled by title and line number.

    Raises:
        CorpusError: The file cannot be read, or a line is not UTF-8, not JSON, not an object, or has no string in its
            field `text`. The message has file, line number and defect.
    """
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
                if line.strip():
                    yield Document(f"{title}:{number}", _text_of(line, f"{path}, line {number:,}"))
    except OSError as error:
        raise CorpusError(f"{path}: cannot be read ({error.strerror}): check the file and its permissions") from error


def _text_of(line: bytes, where: str) -> str:
    """Return the string in the field `text` of one JSON object."""
    try:
        value = json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise CorpusError(f"{where}: not UTF-8 (byte 0x{line[error.start]:02x}): write the file as UTF-8") from error
    except json.JSONDecodeError as error:
        raise CorpusError(f"{where}: not JSON ({error.msg} at column {error.colno}): write one object per line") from error
    except (ValueError, RecursionError) as error:  # a number of too many digits, brackets too deep
        raise CorpusError(f"{where}: JSON that cannot be parsed ({error}): remove this line") from error
    if not isinstance(value, dict):
        raise CorpusError(f'{where}: {_kind(value)} instead of an object: write {{"{FIELD}": "..."}}')
    if FIELD not in value:
        fields = ", ".join(map(repr, list(value)[:8])) or "none"
        raise CorpusError(f'{where}: no field "{FIELD}" (its fields: {fields}): rename the field with the text')
    text = value[FIELD]
    if not isinstance(text, str):
        raise CorpusError(f'{where}: field "{FIELD}" is {_kind(text)}, a string is required')
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise CorpusError(f'{where}: field "{FIELD}" contains half of a surrogate pair: remove this line') from error
    return text


def _kind(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")
