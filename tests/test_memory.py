"""Freed memory goes back to the system, and what a pass has cached is freed at once."""

import gc
import sys
import weakref
from pathlib import Path

import psutil
import pytest
import torch

from eigencache import memory
from eigencache.models.tapped_cache import tapped_cache
from tiny_models import tiny


def test_a_container_limits_what_is_free(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    whole = memory.free_memory()
    assert 0 < whole <= psutil.virtual_memory().total
    limit, use = tmp_path / "memory.max", tmp_path / "memory.current"
    monkeypatch.setattr(memory, "_LIMITS", ((str(limit), str(use)),))
    use.write_text("300\n")
    for written, free in (("1000\n", 700), ("200\n", 0)):
        limit.write_text(written)
        assert memory.free_memory() == free
        assert memory.default_memory() == int(0.6 * free)
    limit.write_text("max\n")
    assert memory.free_memory() > 1000


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
