"""GGUF files: options with which transformers reads them, one parse of the header, and rotations that it does not read."""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from eigencache.errors import ModelError


def gguf_options(options: dict[str, Any]) -> dict[str, Any]:
    """Return the options that name a GGUF file; configuration, model and tokenizer all need them."""
    return {key: value for key, value in options.items() if key == "gguf_file"}


def model_options(options: dict[str, Any], config: PreTrainedConfig) -> dict[str, Any]:
    """Return options to load a model, with the configuration already read from a GGUF file, whose header is long."""
    return options | {"config": config} if "gguf_file" in options else options


@contextmanager
def header_parsed_once() -> Iterator[None]:
    """Share the reader of a GGUF file inside this context, and raise `ModelError` for a file that is cut or damaged.

    transformers parses the header once each for configuration, weights and tokenizer. It contains the vocabulary, so a
    parse takes seconds.
    """
    import gguf  # optional; `source_of` has checked that it is installed

    reader = gguf.GGUFReader

    @functools.cache
    def read(path: Any, *options: Any) -> gguf.GGUFReader:
        try:
            return reader(path, *options)
        except (ValueError, IndexError, KeyError) as error:
            raise ModelError(
                f"{Path(path).name}: cannot be loaded: it is not a whole GGUF file. Download it again."
            ) from error

    gguf.GGUFReader = read  # type: ignore[misc, assignment]
    try:
        yield
    finally:
        gguf.GGUFReader = reader  # type: ignore[misc]


def require_plain_rotation(path: Path) -> None:
    """Refuse a GGUF file that scales its rotation: transformers rotates keys by the base alone, which is another model.

    Args:
        path: The file.

    Raises:
        ModelError: The file has frequency factors other than 1, or a scaling of its rotation.
    """
    from gguf import GGUFReader  # optional; installed wherever transformers has just read this file

    reader = GGUFReader(str(path))
    found = [tensor.name for tensor in reader.tensors if tensor.name.startswith("rope_") and bool((tensor.data != 1).any())]
    for key, plain in (("type", "none"), ("factor", 1.0)):
        for name, entry in reader.fields.items():
            if name.endswith(f".rope.scaling.{key}") and (value := entry.contents()) != plain:
                found.append(f"{name} = {value}")
    if found:
        raise ModelError(
            f"{path.name}: scales its rotation ({', '.join(found)}), which transformers does not read from a GGUF file, so "
            "keys would be rotated by other angles than in the original model. Load that by folder or hub name."
        )
