"""A data set of the Hugging Face hub becomes a text: one row is one document, except where rows are lines.

Needs the package `datasets` (the extra `eigencache[data]`). The split is downloaded whole, once.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from importlib import import_module
from typing import Any

from eigencache.corpora.text import Document, Text, corpus
from eigencache.errors import CorpusError

COLUMN = "text"
DEFAULT_SPLIT = "train"  # the one split that every data set has
WIKITEXT = "Salesforce/wikitext"
WIKITEXT2 = "wikitext-2-raw-v1"
_HEADING = re.compile(r"\s*= (?!=).*(?<!=) =\s*")  # of an article; sections have two equals signs or more
_INSTEAD = "or pass a local file"


@corpus("wikitext2", "wikitext2[:SPLIT]")
def read_wikitext2(split: str) -> Text:
    """`wikitext2` is the test split of WikiText-2 (raw); another split is named after the colon."""
    split = split or "test"
    return _read(f"wikitext2:{split}", WIKITEXT, WIKITEXT2, split)


@corpus("hf", "hf:NAME[:CONFIG[:SPLIT]]")
def read_hub(rest: str) -> Text:
    """`hf:NAME[:CONFIG[:SPLIT]]` is a split (`train` unless named) of a data set on the hub; CONFIG may be empty."""
    name, config, split = [*rest.split(":", 2), "", ""][:3]
    if not name:
        raise CorpusError(
            f"hf:{rest}: no data set is named: write hf:NAME[:CONFIG[:SPLIT]], such as hf:{WIKITEXT}:{WIKITEXT2}"
        )
    split = split or DEFAULT_SPLIT
    return _read(f"hf:{name}:{config}:{split}", name, config or None, split)


def articles(rows: Iterable[str]) -> Iterator[Document]:
    """WikiText's rows are lines; joined up to the next article's heading they are articles, blank lines kept."""
    title, lines = "", []
    for row in rows:
        if _HEADING.fullmatch(row):
            yield Document(title, "".join(lines))
            title, lines = row.strip(" =\n"), []
        lines.append(row or "\n")
    yield Document(title, "".join(lines))


def one_each(rows: Iterable[str]) -> Iterator[Document]:
    """Each row is a document."""
    return (Document(f"row {number}", row) for number, row in enumerate(rows))


ROWS_TO_DOCUMENTS: dict[str, Callable[[Iterable[str]], Iterator[Document]]] = {WIKITEXT: articles, "wikitext": articles}


def _read(spec: str, name: str, config: str | None, split: str) -> Text:
    dataset = _load(spec, name, config, split)
    if COLUMN not in dataset.column_names:
        columns = ", ".join(dataset.column_names)
        raise CorpusError(
            f'{spec}: no column "{COLUMN}" (its columns: {columns}): pass a JSONL file with a field "{COLUMN}"'
        )
    dataset = dataset.select_columns([COLUMN])
    documents = ROWS_TO_DOCUMENTS.get(name, one_each)
    return Text.scan(spec, lambda: documents(_rows(spec, dataset)))


def _load(spec: str, name: str, config: str | None, split: str) -> Any:
    try:
        datasets = import_module("datasets")
    except ImportError as error:
        install = 'pip install "eigencache[data]"'
        raise CorpusError(f"{spec}: needs the package `datasets` ({_first_line(error)}): {install}, {_INSTEAD}") from error
    try:
        return datasets.load_dataset(name, config, split=split)
    except Exception as error:  # the network, the hub, pyarrow and the data set's own files all raise kinds of their own
        what = f"cannot be loaded ({_first_line(error)}): check name, config, split and network, {_INSTEAD}"
        raise CorpusError(f"{spec}: {what}") from error


def _rows(spec: str, dataset: Iterable[dict[str, Any]]) -> Iterator[str]:
    for number, row in enumerate(dataset):
        text = row[COLUMN]
        if text is not None and not isinstance(text, str):
            raise CorpusError(f'{spec}: column "{COLUMN}" holds a {type(text).__name__} in row {number:,}, not a string')
        yield text or ""


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), "") or type(error).__name__
