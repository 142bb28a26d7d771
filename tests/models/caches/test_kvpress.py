"""Presses evict the given share, the rest is counted, and tokens that follow keep their positions in the text."""

import sys
from importlib.util import find_spec

import pytest
import torch

from eigencache.codec.base import SixteenBit
from eigencache.errors import CodecError
from eigencache.evaluate.divergence import generate_greedily
from eigencache.evaluate.prefix import read_prefix
from eigencache.models.caches import kvpress
from eigencache.models.caches.kvpress import Evicted, refusal
from eigencache.models.load import LoadedModel
from stub_codecs import bundled, tiny_loaded
from tiny_models import tiny, token_ids

if find_spec("kvpress") is None:
    pytest.skip("kvpress is not installed: pip install 'eigencache[peers]'", allow_module_level=True)
PRESSES = ("knorm", "snapkv", "expected-attention")
MODELS = ("llama", "ref-llama", "ref-qwen2")
TOKENS = 80  # more than the 64 that SnapKV keeps in any case


def one(name: str) -> LoadedModel:
    return bundled(name) if name.startswith("ref-") else tiny_loaded(name)


def text(tokens: int = TOKENS + 8, rows: int = 2) -> torch.Tensor:
    return torch.randint(1, 100, (rows, tokens), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("press", PRESSES)
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_at_ratio_zero_it_is_the_plain_cache_in_16_bits(name: str, press: kvpress.Press) -> None:
    loaded, ids = one(name), text()
    prefix = read_prefix(loaded, ids[:, :TOKENS])
    found = prefix.logits(ids[:, TOKENS:], Evicted(press, 0.0))
    torch.testing.assert_close(found, prefix.logits(ids[:, TOKENS:], SixteenBit()), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found, prefix.logits(ids[:, TOKENS:], None), atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("press", PRESSES)
@pytest.mark.parametrize("ratio", [0.25, 0.5, 0.9])
@torch.no_grad()
def test_its_bytes_are_16_bits_of_what_is_left(press: kvpress.Press, ratio: float) -> None:
    made, loaded = Evicted(press, ratio), tiny_loaded("llama")
    cache = made.cache_of(read_prefix(loaded, text()[:, :TOKENS]))
    left = int(TOKENS * (1 - ratio))
    assert made.held(cache) == (2 * TOKENS, 2 * left * 3 * 2 * 2 * 16 * 2)  # rows, layers, slots, KV heads, head_dim, bytes
    assert {layer.keys.shape for layer in cache.layers} == {(2, 2, left, 16)}
    assert {layer.keys.dtype for layer in cache.layers} == {torch.float16}
    assert cache.get_seq_length() == TOKENS


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_later_tokens_come_after_the_whole_prefix(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All heads are made to evict the same tokens, so one pass with those tokens masked must give the same logits."""
    loaded, ids = one(name), text()
    gone = torch.arange(0, TOKENS, 2)
    scores = torch.ones(TOKENS).index_fill(0, gone, 0.0)
    press = kvpress._kvpress().KnormPress
    monkeypatch.setattr(press, "score", lambda _self, _module, _hidden, keys, *_: scores.expand(keys.shape[:3]))
    prefix = read_prefix(loaded, ids[:, :TOKENS])
    seen = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril()
    seen[TOKENS:, gone] = False
    mask = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    whole = loaded.model(input_ids=ids, attention_mask=mask[None, None].expand(2, 1, -1, -1), use_cache=False).logits
    found = prefix.logits(ids[:, TOKENS:], Evicted("knorm", 0.5))
    torch.testing.assert_close(found, whole[:, TOKENS:], atol=2e-2, rtol=2e-2)
    each, cache = [], Evicted("knorm", 0.5).cache_of(prefix)
    for at in range(TOKENS, ids.shape[1]):
        each.append(loaded.model(input_ids=ids[:, at : at + 1], past_key_values=cache).logits)
    torch.testing.assert_close(torch.cat(each, 1), found, atol=1e-4, rtol=1e-4)
    assert float((found - prefix.logits(ids[:, TOKENS:], None)).abs().max()) > 0.1


@torch.no_grad()
def test_generation_goes_through_it() -> None:
    ids = text(rows=2)
    prefix = read_prefix(tiny_loaded("llama"), ids[:, :-1])
    plain = generate_greedily(prefix, ids, SixteenBit(), 8)
    assert torch.equal(generate_greedily(prefix, ids, Evicted("snapkv", 0.0), 8), plain)
    cache, last, own = Evicted("knorm", 0.5).cache_of(prefix), ids[:, -1:], []
    for _ in range(8):
        last = prefix.loaded.model(input_ids=last, past_key_values=cache).logits[:, -1:].argmax(-1)
        own.append(last)
    assert torch.equal(generate_greedily(prefix, ids, Evicted("knorm", 0.5), 8), torch.cat(own, 1))


@torch.no_grad()
def test_the_model_and_the_attention_functions_are_left_as_they_were() -> None:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

    loaded = tiny_loaded("llama")  # shared: a live cache of another test may still have its hooks on it
    before = [(name, list(module._forward_hooks)) for name, module in loaded.model.named_modules()]
    Evicted("expected-attention", 0.5).cache_of(read_prefix(loaded, text()[:, :TOKENS]))
    assert [(name, list(module._forward_hooks)) for name, module in loaded.model.named_modules()] == before
    assert not any(function.__module__.startswith("kvpress") for function in ALL_ATTENTION_FUNCTIONS.values())
    registered = dict(AttentionInterface._global_mapping)
    assert dict(ALL_ATTENTION_FUNCTIONS) == registered  # nothing hides what is registered from now on


@torch.no_grad()
def test_short_prefixes_are_kept_and_what_is_gone_does_not_come_back() -> None:
    loaded, ids = tiny_loaded("llama"), token_ids()
    prefix = read_prefix(loaded, ids[:, :20])
    short = Evicted("snapkv", 0.9)
    assert torch.equal(prefix.logits(ids[:, 20:], short), prefix.logits(ids[:, 20:], Evicted("snapkv", 0.0)))
    assert short.held(short.cache_of(read_prefix(loaded, ids[:, :0]))) == (0, 0)
    with pytest.raises(CodecError, match="cannot be cropped"):
        short.cache_of(prefix).crop(-1)


def test_other_models_and_a_missing_package_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert refusal(bundled("ref-llama").model) is None
    assert refusal(bundled("ref-qwen2").model) is None
    assert str(refusal(tiny("gpt2"))).startswith("kvpress works on Llama, Mistral")
    assert str(refusal(tiny("deepseek_v3"))).startswith("kvpress works on Llama, Mistral")
    assert refusal(tiny("qwen2")) == "some of its layers drop tokens by themselves"
    kvpress._kvpress.cache_clear()
    with monkeypatch.context() as broken:
        broken.setitem(sys.modules, "kvpress", None)
        broken.setattr(kvpress, "find_spec", lambda _: object())
        assert str(refusal(tiny("llama"))).startswith("kvpress cannot be imported: ")
    monkeypatch.setattr(kvpress, "find_spec", lambda _: None)
    assert refusal(tiny("llama")) == "the package kvpress is not installed: install 'eigencache[peers]'"
