"""Tensors of a cache are those of the model, and a cache made of them continues as the first one does."""

from types import SimpleNamespace

import pytest
import torch
from transformers import DynamicCache, PreTrainedModel, QuantizedCache, StaticCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from eigencache.errors import CodecError
from eigencache.models.caches.tensors import cache_holding, cached_of, first_slot, tensors_of
from tiny_models import tiny, token_ids

pytestmark = pytest.mark.versions

MODELS = ("llama", "gpt2", "deepseek_v2", "mistral", "gemma2")
WINDOW, READ = 8, 15


@torch.no_grad()
def read(model: PreTrainedModel, ids: torch.Tensor) -> DynamicCache:
    return model(ids, use_cache=True).past_key_values


@pytest.mark.parametrize("name", MODELS)
def test_what_is_read_is_what_every_layer_holds(name: str) -> None:
    cache = read(tiny(name), token_ids(2)[:, :READ])
    found = cached_of(cache)
    assert list(found) == list(range(len(cache.layers)))
    for layer, (keys, values) in zip(cache.layers, found.values(), strict=True):
        assert keys.data_ptr() == layer.keys.data_ptr() and values.data_ptr() == layer.values.data_ptr()
        assert keys.shape[2] == (WINDOW - 1 if isinstance(layer, DynamicSlidingWindowLayer) else READ)
    assert first_slot(cache) == (READ - WINDOW + 1 if name == "mistral" else 0)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("tokens", [1, WINDOW - 1, WINDOW, READ])
@torch.no_grad()
def test_a_cache_that_is_made_again_continues_bit_for_bit(name: str, tokens: int) -> None:
    """Windows are shorter than the text: positions continue after all tokens read, not after those held."""
    model, ids = tiny(name), token_ids()
    cache = read(model, ids[:, :tokens])
    start, held = first_slot(cache), cached_of(cache)
    again = cache_holding(model, held, start, tokens - start)
    assert again.get_seq_length() == cache.get_seq_length() == tokens
    assert [type(layer) for layer in again.layers] == [type(layer) for layer in cache.layers]
    for at in range(tokens, tokens + 6):
        piece = ids[:, at : at + 1]
        logits = [model(piece, past_key_values=one, use_cache=True).logits for one in (cache, again)]
        assert torch.equal(*logits)


@torch.no_grad()
def test_a_cache_that_is_made_again_is_its_own() -> None:
    cache = read(tiny("llama"), token_ids()[:, :READ])
    before = cache.layers[0].keys.clone()
    again = cache_holding(tiny("llama"), cached_of(cache), 0, READ)
    tiny("llama")(token_ids()[:, READ:], past_key_values=again)
    assert again.get_seq_length() == 24 and torch.equal(cache.layers[0].keys, before)


def test_a_layer_without_a_window_has_to_hold_every_token() -> None:
    held = cached_of(read(tiny("llama"), token_ids()[:, :READ]))
    with pytest.raises(CodecError, match="layer 0 has 15 of 16 tokens and no sliding window: pass all tokens"):
        cache_holding(tiny("llama"), held, 0, READ + 1)


# What is no cache of keys and values


@pytest.mark.parametrize(
    "empty", [DynamicCache, lambda: DynamicCache(config=tiny("gemma2").config)], ids=["plain", "windows"]
)
def test_an_empty_cache_is_refused(empty) -> None:
    with pytest.raises(CodecError, match="the cache is empty: run the model on some text first"):
        cached_of(empty())


@pytest.mark.parametrize("thing", [None, ((torch.ones(1), torch.ones(1)),), SimpleNamespace(keys=1), "a cache", {}])
def test_what_is_no_cache_is_named(thing: object) -> None:
    with pytest.raises(CodecError, match=f"`cache` is of type {type(thing).__name__}, not a transformers cache: pass"):
        cached_of(thing)


@torch.no_grad()
def test_a_cache_of_another_kind_is_named_by_its_layer() -> None:
    model = tiny("llama")
    static = StaticCache(config=model.config, max_cache_len=24)
    model(token_ids()[:, :READ], past_key_values=static)
    with pytest.raises(
        CodecError, match="layer 0 of the cache is a StaticLayer, which cannot be encoded: use a DynamicCache"
    ):
        cached_of(static)


@torch.no_grad()
def test_layers_beside_attention_are_named() -> None:
    with pytest.raises(CodecError, match=r"layer 0 of the cache is a .*, which cannot be encoded"):
        cached_of(read(tiny("jamba"), token_ids()[:, :READ]))


def test_a_subclass_may_hold_something_else_and_is_refused() -> None:
    class Rounded(DynamicLayer):
        pass

    layer = Rounded()
    layer.update(torch.ones(1, 1, 2, 4), torch.ones(1, 1, 2, 4))
    with pytest.raises(CodecError, match="layer 0 of the cache is a Rounded"):
        cached_of(SimpleNamespace(layers=[layer]))
    assert issubclass(QuantizedCache, DynamicCache.__mro__[1])


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "gpt2", "deepseek_v2"])
def test_a_stretch_continues_at_its_positions_as_if_what_is_before_were_masked(name: str) -> None:
    model, ids = tiny(name), token_ids()
    full = DynamicCache(config=model.config)
    model(input_ids=ids[:, :16], past_key_values=full, use_cache=True)
    held = {i: (k[:, :, 6:], v[:, :, 6:]) for i, (k, v) in cached_of(full).items()}
    stretch = cache_holding(model, held, 6, 10)
    assert stretch.get_seq_length() == 16 and first_slot(stretch) == 6
    mask = torch.cat([torch.zeros(len(ids), 6), torch.ones(len(ids), 14)], 1).long()
    positions = torch.arange(16, 20)[None]
    right = model(input_ids=ids[:, 16:20], past_key_values=full, attention_mask=mask, position_ids=positions).logits
    found = model(input_ids=ids[:, 16:20], past_key_values=stretch, use_cache=True).logits
    torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-4)
    whole = torch.ones(len(ids), 20).long()
    again = cache_holding(model, held, 6, 10)
    torch.testing.assert_close(
        model(input_ids=ids[:, 16:20], past_key_values=again, attention_mask=whole, position_ids=positions).logits,
        right, rtol=1e-4, atol=1e-4,
    )  # fmt: skip


@torch.no_grad()
def test_a_stop_whose_window_is_not_held_is_refused() -> None:
    model, ids = tiny("mistral"), token_ids()
    cache = DynamicCache(config=model.config)
    model(input_ids=ids[:, :20], past_key_values=cache, use_cache=True)
    held = cached_of(cache)
    for count, start, tokens in ((0, 0, 12), (3, 0, 18), (2, 18, 2)):
        part = {i: (k[:, :, :count], v[:, :, :count]) for i, (k, v) in held.items()}
        with pytest.raises(CodecError, match=r"attends to the last 7 tokens before position \d+, but only \d are present"):
            cache_holding(model, part, start, tokens)


def test_tensors_are_found_wherever_they_are() -> None:
    a, b, c = torch.ones(1), torch.ones(2), torch.ones(3)
    assert [len(t) for t in tensors_of({"a": a, "b": [b, ("no", {"c": c})], "d": None})] == [1, 2, 3]
