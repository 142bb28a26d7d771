"""Texts from data sets of the Hugging Face hub; each row is one document, except for data sets whose rows are lines.

Requires the package `datasets` (the extra `eigencache[data]`). A whole split is downloaded at its first use.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

from huggingface_hub import constants, get_session
from huggingface_hub.errors import HTTPError  # pyright: ignore[reportPrivateImportUsage] - of httpx or httpx2, by version

from eigencache.corpora.text import Document, Text, corpus
from eigencache.errors import CorpusError

COLUMN = "text"
DEFAULT_SPLIT = "train"  # exists in every data set
WIKITEXT = "Salesforce/wikitext"
WIKITEXT2 = "wikitext-2-raw-v1"
_HEADING = re.compile(r"\s*= (?!=).*(?<!=) =\s*")  # of an article; headings of sections have two or more equals signs
_INSTEAD = "or pass a local file"
_CONNECT_SECONDS = 5


@corpus("wikitext2", "wikitext2[:SPLIT]")
def read_wikitext2(split: str) -> Text:
    """Read a split of WikiText-2 (raw); default: `test`."""
    split = split or "test"
    return _read(f"wikitext2:{split}", WIKITEXT, WIKITEXT2, split)


@corpus("hf", "hf:NAME[:CONFIG[:SPLIT]]")
def read_hub(rest: str) -> Text:
    """Read a split of a data set on the hub from NAME[:CONFIG[:SPLIT]]; CONFIG may be empty, default split: `train`."""
    name, config, split = [*rest.split(":", 2), "", ""][:3]
    if not name:
        raise CorpusError(
            f"hf:{rest}: the name of the data set is missing: write hf:NAME[:CONFIG[:SPLIT]], such as "
            f"hf:{WIKITEXT}:{WIKITEXT2}"
        )
    split = split or DEFAULT_SPLIT
    return _read(f"hf:{name}:{config}:{split}", name, config or None, split)


def articles(rows: Iterable[str]) -> Iterator[Document]:
    """Join the lines of WikiText to articles, each titled by its heading; blank lines are kept."""
    title, lines = "", []
    for row in rows:
        if _HEADING.fullmatch(row):
            yield Document(title, "".join(lines))
            title, lines = row.strip(" =\n"), []
        lines.append(row or "\n")
    yield Document(title, "".join(lines))


def one_each(rows: Iterable[str]) -> Iterator[Document]:
    """Return each row as one document."""
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
    unreachable = _connection_error()
    try:
        with _offline(datasets, unreachable is not None):
            return datasets.load_dataset(name, config, split=split)
    except Exception as error:  # network, hub, pyarrow and the loader of the data set have no common base class
        if unreachable is not None:
            what = f"the hub cannot be reached ({_first_line(unreachable)}), and the data set is not in the local cache"
            raise CorpusError(f"{spec}: {what}: check the network, {_INSTEAD}") from error
        what = f"cannot be loaded ({_first_line(error)}): check name, config, split and network, {_INSTEAD}"
        raise CorpusError(f"{spec}: {what}") from error


def _connection_error() -> HTTPError | None:
    """Return the error of a connection to the hub; None if it answers, or if offline mode is already on."""
    if constants.HF_HUB_OFFLINE:
        return None
    try:
        get_session().head(constants.ENDPOINT, timeout=_CONNECT_SECONDS)
    except HTTPError as error:
        return error
    return None


@contextmanager
def _offline(datasets: Any, offline: bool) -> Iterator[None]:
    """Let `datasets` use its local cache only, if `offline`: without a network it would retry for more than a minute."""
    if not offline:
        yield
        return
    before = datasets.config.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE = before


def _rows(spec: str, dataset: Iterable[dict[str, Any]]) -> Iterator[str]:
    for number, row in enumerate(dataset):
        text = row[COLUMN]
        if text is not None and not isinstance(text, str):
            raise CorpusError(
                f'{spec}: column "{COLUMN}" contains a {type(text).__name__} in row {number:,}, a string is required'
            )
        yield text or ""


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), "") or type(error).__name__
