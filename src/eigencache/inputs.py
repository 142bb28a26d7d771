"""What callers hand over as model, tokenizer and text, in the forms that PyTorch users have them in."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from torch import nn

from eigencache.corpora.resolve import read_text
from eigencache.corpora.text import Document, Text
from eigencache.errors import CorpusError, ModelError
from eigencache.geometry import geometry_from_config
from eigencache.models.load import LoadedModel, check_tokenizer, load, load_tokenizer, with_evidence, wrapped_tokenizer

_TEXT_USAGE = "give a name such as 'stdlib', a path, or an iterable of strings"


def model_of(model: Any, tokenizer: Any = None, *, device: str | None = None, dtype: str | None = None) -> LoadedModel:
    """Return a model that is given as a name, a folder or an object, with its tokenizer.

    Args:
        model: a name or a path, or a loaded model of transformers.
        device: where to load a model that is given by its name; a loaded model stays where it is.
        dtype: the number format to load it in.
        tokenizer: a name or a path, a tokenizer of transformers, or a `tokenizers.Tokenizer`; needed for a model object.

    Raises:
        ModelError: `model` is something else, such as a configuration, comes without a tokenizer, or cannot be loaded.
        TokenizerMismatchError: the tokenizer has ids that the model does not embed.
    """
    if isinstance(model, LoadedModel):
        return model
    model, tokenizer = (str(x) if isinstance(x, Path) else x for x in (model, tokenizer))
    if isinstance(model, str):
        if tokenizer is None or isinstance(tokenizer, str):
            return load(model, device=device, dtype=dtype, tokenizer=tokenizer)
        model = load(model, device=device, dtype=dtype).model
    if not isinstance(model, nn.Module):
        raise ModelError(f"`model` is a {type(model).__name__}: give a loaded model of transformers, a name or a folder")
    if tokenizer is None:
        raise ModelError("`tokenizer` is missing: a loaded model needs its own, give it as the argument behind the model")
    if isinstance(tokenizer, str):
        tokenizer = load_tokenizer(tokenizer)
    elif isinstance(tokenizer, Tokenizer):
        tokenizer = wrapped_tokenizer(tokenizer)
    check_tokenizer(tokenizer, model)  # type: ignore[arg-type]
    name = Path(model.config.name_or_path).name or type(model).__name__  # type: ignore[union-attr, arg-type]
    geometry = with_evidence(geometry_from_config(model.config), model)  # type: ignore[arg-type]
    return LoadedModel(name, model.eval(), tokenizer, geometry)  # type: ignore[arg-type]


def text_of(text: Any) -> Text:
    """Return the documents of a text that is given as a spec, as a path, as itself or as an iterable.

    Args:
        text: a spec as of `--text`; a path; a string with a line break, which is the text itself; or an iterable of
            strings, of paths, or of rows with a field "text", as a `datasets.Dataset` gives them.

    Raises:
        CorpusError: naming the document that is something else, or that cannot be written as UTF-8.
    """
    if isinstance(text, Text):
        return text
    if isinstance(text, Path):
        return read_text(str(text))
    if isinstance(text, str) and "\n" not in text:
        return read_text(text)
    if isinstance(text, str):
        text = [text]
    if isinstance(text, Mapping | bytes) or not isinstance(text, Iterable):
        raise CorpusError(f"`text` is a {type(text).__name__}: {_TEXT_USAGE}")
    documents = [document for index, one in enumerate(text) for document in _documents(index, one)]
    return Text.scan("documents passed from Python", lambda: documents)


def _documents(index: int, one: Any) -> Iterable[Document]:
    """The documents of one item of an iterable."""
    if isinstance(one, Path):
        return list(read_text(str(one)).documents)
    found = one.get("text") if isinstance(one, Mapping) else one
    if not isinstance(found, str):
        has = f'a {type(one).__name__} without a string "text"' if isinstance(one, Mapping) else f"a {type(one).__name__}"
        raise CorpusError(f"document {index} is {has}: {_TEXT_USAGE}")
    try:
        found.encode()
    except UnicodeEncodeError as error:
        raise CorpusError(
            f"document {index}: character {error.start} is no text ({found[error.start]!r}): decode the file it came from "
            "with errors='replace'"
        ) from error
    return [Document(f"document {index}", found)]
