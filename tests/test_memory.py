"""Freed memory goes back to the system, and what a pass has cached is freed at once."""

import gc
import sys
import weakref

import pytest
import torch

from eigencache import memory
from eigencache.models.tapped_cache import tapped_cache
from tiny_models import tiny


def test_release_is_harmless_with_any_c_library(monkeypatch: pytest.MonkeyPatch) -> None:
    memory.release()
    monkeypatch.setattr(sys, "platform", "darwin")
    memory._trim.cache_clear()
    memory.release()
    memory._trim.cache_clear()


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "deepseek_v3"])
def test_a_tapped_cache_is_freed_without_garbage_collection(name: str) -> None:
    model = tiny(name)
    gc.collect()
    gc.disable()
    try:
        cache, stored = tapped_cache(model)
        with torch.no_grad():
            model(input_ids=torch.zeros(1, 8, dtype=torch.int64), past_key_values=cache, use_cache=True)
        layer, keys = weakref.ref(cache.layers[0]), weakref.ref(stored[0][0])
        assert layer() is not None and keys() is not None
        del cache, stored
        assert layer() is None and keys() is None
    finally:
        gc.enable()
