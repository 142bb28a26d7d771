"""Conversion of the arguments of the Python API: models, tokenizers and texts in the forms that PyTorch users have."""

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
from eigencache.models.sources import source_of
from eigencache.records.base import Record

_TEXT_USAGE = "pass a name such as 'stdlib', a path, or an iterable of strings"


def model_of(model: Any, tokenizer: Any = None, *, device: str | None = None, dtype: str | None = None) -> LoadedModel:
    """Return a loaded model with its tokenizer.

    Args:
        model: Bundled name, hub name, path, a loaded transformers model, or a `LoadedModel`, which is returned unchanged.
        tokenizer: Name, path, transformers tokenizer or `tokenizers.Tokenizer`. Required when `model` is a model object;
            default: the tokenizer of the named model.
        device: Device to load a named model to. A model object stays on its device.
        dtype: Number format to load a named model in.

    Returns:
        The model in eval mode, its tokenizer and its geometry.

    Raises:
        ModelError: `model` has another type (for example a configuration) or is no transformers model, its tokenizer is
            missing, or it cannot be loaded.
        TokenizerMismatchError: The tokenizer has ids that the model does not embed.
    """
    if isinstance(model, LoadedModel):
        return model
    model, tokenizer = (str(x) if isinstance(x, Path) else x for x in (model, tokenizer))
    if isinstance(model, str):
        if tokenizer is None or isinstance(tokenizer, str):
            return load(model, device=device, dtype=dtype, tokenizer=tokenizer)
        model = load(model, device=device, dtype=dtype).model
    if not isinstance(model, nn.Module):
        raise ModelError(f"`model` is of type {type(model).__name__}: pass a loaded transformers model, a name or a folder")
    if not hasattr(model, "get_input_embeddings"):
        raise ModelError(
            f"`model` is a {type(model).__name__}, which is no transformers model: pass what "
            "AutoModelForCausalLM.from_pretrained returned"
        )
    if tokenizer is None:
        raise ModelError("`tokenizer` is missing: pass it as the argument after the loaded model")
    if isinstance(tokenizer, str):
        tokenizer = load_tokenizer(tokenizer)
    elif isinstance(tokenizer, Tokenizer):
        tokenizer = wrapped_tokenizer(tokenizer)
    check_tokenizer(tokenizer, model)  # type: ignore[arg-type]
    name = Path(model.config.name_or_path).name or type(model).__name__  # type: ignore[union-attr, arg-type]
    geometry = with_evidence(geometry_from_config(model.config), model)  # type: ignore[arg-type]
    return LoadedModel(name, model.eval(), tokenizer, geometry)  # type: ignore[arg-type]


def check_names(models: Iterable[Any]) -> None:
    """Check that named models exist, before any of them is loaded; loaded models are skipped.

    Names on the hub are not looked up.

    Raises:
        ModelError: There is no such model; errors of `models.sources.source_of`.
    """
    for model in models:
        if isinstance(model, str | Path):
            source_of(str(model))


def several(values: Any) -> list[Any]:
    """Return values as a list. A single value, such as a string, a path, a number or a record, is a list of one."""
    return [values] if isinstance(values, str | Record) or not isinstance(values, Iterable) else list(values)


def text_of(text: Any) -> Text:
    """Return a text as documents with a content hash.

    Args:
        text: A text specification (`resolve.read_text`), a path, a string with a line break (the text itself), or an
            iterable of strings, paths or rows with a field "text", such as a `datasets.Dataset`.

    Returns:
        The documents in order. Their titles are file names or "document N".

    Raises:
        CorpusError: A document has another type or cannot be encoded as UTF-8; the message names the document.
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
        raise CorpusError(f"`text` is of type {type(text).__name__}: {_TEXT_USAGE}")
    documents = [document for index, item in enumerate(text) for document in _documents(index, item)]
    return Text.scan("documents passed from Python", lambda: documents)


def _documents(index: int, item: Any) -> Iterable[Document]:
    """Return the documents of one item of an iterable."""
    if isinstance(item, Path):
        return list(read_text(str(item)).documents)
    content = item.get("text") if isinstance(item, Mapping) else item
    if not isinstance(content, str):
        kind = type(item).__name__
        has = f'a {kind} without a string "text"' if isinstance(item, Mapping) else f"a {kind}"
        raise CorpusError(f"document {index} is {has}: {_TEXT_USAGE}")
    try:
        content.encode()
    except UnicodeEncodeError as error:
        raise CorpusError(
            f"document {index}: character {error.start} ({content[error.start]!r}) cannot be encoded as UTF-8: decode its "
            "source file with errors='replace'"
        ) from error
    return [Document(f"document {index}", content)]
