"""GGUF files: options with which transformers reads them, one parse of the header, and a warning for unread rotations."""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from logging import getLogger
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

_LOG = getLogger(__name__)


def gguf_options(options: dict[str, Any]) -> dict[str, Any]:
    """Return the options that name a GGUF file; configuration, model and tokenizer all need them."""
    return {key: value for key, value in options.items() if key == "gguf_file"}


def model_options(options: dict[str, Any], config: PreTrainedConfig) -> dict[str, Any]:
    """Return options to load a model, with the configuration already read from a GGUF file, whose header is long."""
    return options | {"config": config} if "gguf_file" in options else options


@contextmanager
def header_parsed_once() -> Iterator[None]:
    """Share the reader of a GGUF file inside this context.

    transformers parses the header once each for configuration, weights and tokenizer. It contains the vocabulary, so a
    parse takes seconds.
    """
    import gguf  # optional; `source_of` has checked that it is installed

    reader = gguf.GGUFReader
    gguf.GGUFReader = functools.cache(reader)  # type: ignore[misc, assignment]
    try:
        yield
    finally:
        gguf.GGUFReader = reader  # type: ignore[misc]


def warn_of_dropped_rotation(path: Path) -> None:
    """Log a warning if a GGUF file scales its rotation, because transformers ignores this and uses the base only."""
    from gguf import GGUFReader  # optional; installed wherever transformers has just read this file

    reader = GGUFReader(str(path))
    names = [tensor.name for tensor in reader.tensors if tensor.name.startswith("rope_")]
    names += [key for key in reader.fields if ".rope.scaling." in key]
    if names:
        _LOG.warning(
            "%s: transformers does not read %s and rotates keys by the base alone, so logits and spectra differ from those "
            "of the original model: load the original model by folder or hub name for its figures",
            path.name,
            ", ".join(names),
        )
