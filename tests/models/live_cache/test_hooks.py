"""`enable` adds hooks once, the last handle or `disable` removes them, and constructing a cache compiles nothing."""

import copy
import gc
from typing import Any

import pytest
import torch
from torch import nn
from transformers import DynamicCache

from eigencache.errors import CodecError, UnsupportedArchitectureError
from eigencache.models.live_cache import cache as cache_module
from eigencache.models.live_cache.cache import CompressedCache
from eigencache.models.live_cache.hooks import disable, enable
from live_codecs import fine_codec, long_ids, long_model


@pytest.fixture
def model() -> Any:
    return copy.deepcopy(long_model("llama"))


def hooks(model: Any) -> tuple[int, int, bool]:
    counts = (len(module._forward_pre_hooks) + len(module._forward_hooks) for module in (model, model.base_model))
    return *counts, "prepare_inputs_for_generation" in vars(model)


@torch.no_grad()
def read(model: Any, cache: Any, ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids, past_key_values=cache, use_cache=True).logits


def test_enable_adds_hooks_once_and_the_last_handle_removes_them(model) -> None:
    attention = model.config._attn_implementation
    first, second = enable(model), enable(torch.compile(model, backend="eager"))
    assert hooks(model) == (2, 2, True) and model.config._attn_implementation == attention
    first.close()
    first.close()
    assert hooks(model) == (2, 2, True)
    second.close()
    assert hooks(model) == (0, 0, False)
    with enable(model):
        assert hooks(model) == (2, 2, True)
    assert hooks(model) == (0, 0, False)


def test_hooks_of_a_cache_are_removed_with_it_unless_the_model_was_enabled(model) -> None:
    codec = fine_codec(model)
    with enable(model):
        cache = CompressedCache(model, codec)
        del cache
        gc.collect()
        assert hooks(model) == (2, 2, True)
    cache = CompressedCache(model, codec)
    copied = copy.deepcopy(cache)
    del cache
    assert hooks(model) == (2, 2, True)
    del copied
    assert hooks(model) == (0, 0, False)


def test_a_model_and_its_base_model_share_hooks(model) -> None:
    codec, ids = fine_codec(model), long_ids()
    of_base = CompressedCache(model.base_model, codec)
    assert hooks(model) == (0, 2, False)
    of_model = CompressedCache(model, codec)
    assert hooks(model) == (2, 2, True)
    for cache in (of_base, of_model):
        read(model, cache, ids[:, :100])
        with torch.no_grad():
            model.base_model(input_ids=ids[:, 100:], past_key_values=cache, use_cache=True)
        assert cache.compressed_layers[0].blocks == 3
    del of_base, of_model, cache
    assert hooks(model) == (0, 0, False)


def test_after_disable_a_pass_with_a_cache_fails_and_nothing_is_lost(model) -> None:
    codec, ids = fine_codec(model), long_ids()
    cache = CompressedCache(model, codec)
    read(model, cache, ids[:, :100])
    disable(model)
    disable(model)
    assert hooks(model) == (0, 0, False)
    assert read(model, DynamicCache(config=model.config), ids).isfinite().all()
    for tokens in (1, 2):
        with pytest.raises(CodecError, match=r"cannot read the compressed cache, .* whose model was disabled"):
            read(model, cache, ids[:, 100 : 100 + tokens])
        assert cache.get_seq_length() == 100
    with enable(model):
        read(model, cache, ids[:, 100:])
        assert cache.compressed_layers[0].blocks == 3


def test_a_model_that_cannot_be_served_is_left_alone(model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model.config, "is_encoder_decoder", True)
    with pytest.raises(UnsupportedArchitectureError, match="encoder-decoder models are not supported"):
        enable(model)
    assert hooks(model) == (0, 0, False)
    with pytest.raises(UnsupportedArchitectureError, match="`model` is of type Linear"):
        enable(nn.Linear(2, 2))


def test_the_backend_is_compiled_or_refused_in_the_first_pass_and_not_before(model, monkeypatch) -> None:
    codec, ids, calls = fine_codec(model), long_ids(), []
    choose = cache_module.packed_backend

    def counted(*given: Any) -> Any:
        calls.append(given[2])
        return choose(*given)

    monkeypatch.setattr(cache_module, "packed_backend", counted)
    cache = CompressedCache(model, codec, backend="reference")
    wrong = CompressedCache(model, codec, backend="fast")  # type: ignore[arg-type]
    assert not calls
    read(model, cache, ids)
    assert calls == ["reference"]
    attention = model.config._attn_implementation
    with pytest.raises(CodecError, match="fast"):
        read(model, wrong, ids)
    assert wrong.get_seq_length() == 0 and model.config._attn_implementation == attention
    read(model, cache, ids[:, :1])
    assert cache.get_seq_length() == ids.shape[1] + 1


@pytest.mark.parametrize("then", ["a pass with a cache", "a plain pass", "disable"])
def test_an_interrupt_leaves_the_attention_of_the_model_in_place(model, then: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model.set_attn_implementation("eager")
    cache, ids = CompressedCache(model, fine_codec(model)), long_ids()

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(model.model.layers[1].mlp, "forward", interrupted)
        with pytest.raises(KeyboardInterrupt):
            read(model, cache, ids)
    if then == "disable":
        disable(model)
    else:
        read(model, cache if then == "a pass with a cache" else DynamicCache(config=model.config), ids)
    assert model.config._attn_implementation == "eager"
