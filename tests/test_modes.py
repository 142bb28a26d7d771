"""Autocast and inference mode of the caller change neither the bytes nor the results of later calls."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

import eigencache
from eigencache.api import CacheCodec
from eigencache.fitting.eigen import EigenSettings
from eigencache.models.load import LoadedModel, load
from eigencache.modes import own_modes
from live_codecs import fine_codec, long_ids, long_model

pytestmark = pytest.mark.slow

MODES = pytest.mark.parametrize("mode", [lambda: torch.autocast("cpu", torch.bfloat16), torch.inference_mode, torch.no_grad])
FEW = {"tokens": 2048, "max_length": 128}


@pytest.fixture(scope="module")
def own() -> LoadedModel:
    return load("ref-llama", device="cpu")


def fitted(own: LoadedModel, **settings: Any) -> CacheCodec:
    chosen = EigenSettings("layer", text=False, **settings)
    return eigencache.fit(own.model, own.tokenizer, "stdlib", bits=2.0, settings=chosen, **FEW)


@pytest.fixture(scope="module")
def codec(own: LoadedModel) -> CacheCodec:
    return fitted(own, metric="frobenius")


@MODES
def test_bytes_and_what_comes_of_them_are_those_of_any_mode(
    mode: Callable[[], Any], own: LoadedModel, codec: CacheCodec
) -> None:
    ids = torch.randint(1, 4000, (1, 150), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        cache = own.model(ids, use_cache=True).past_key_values
    fresh = CacheCodec(own, copy.deepcopy(codec.codec))  # has no cached constants yet
    with mode():
        inside = fresh.encode(cache)
        decoded = fresh.decode(inside)
    assert inside == fresh.encode(cache) == codec.encode(cache)
    for one, other in zip(decoded.layers, codec.decode(inside).layers, strict=True):
        assert one.keys.equal(other.keys) and one.values.equal(other.values)
        assert not one.keys.is_inference()


@MODES
def test_a_fit_inside_a_mode_is_the_fit_outside(mode: Callable[[], Any], own: LoadedModel) -> None:
    with mode():
        inside = fitted(own, metric="fisher")
    assert inside.codec.sha256 == fitted(own, metric="fisher").codec.sha256


def test_a_live_cache_used_in_a_mode_serves_gradients_afterwards() -> None:
    model, ids = copy.deepcopy(long_model("llama")), long_ids(1)
    codec = fine_codec(model)
    for mode in (torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)):
        with mode():
            cache = eigencache.CompressedCache(model, codec)
            for a, b in ((0, 150), (150, 151)):
                model(input_ids=ids[:, a:b], past_key_values=cache, use_cache=True)
    cache = eigencache.CompressedCache(model, codec)
    with torch.no_grad():
        model(input_ids=ids[:, :150], past_key_values=cache, use_cache=True)
    logits = model(input_ids=ids[:, 150:], past_key_values=cache, use_cache=True).logits
    logits.square().sum().backward()
    expected = model(input_ids=ids).logits[:, 150:]
    assert float((logits - expected).abs().max()) < 0.1
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters() if p.requires_grad)


def test_a_model_in_training_is_so_again(own: LoadedModel) -> None:
    model = copy.deepcopy(own.model).train().requires_grad_(False)
    model.model.layers[0].eval()
    before = [module.training for module in model.modules()]
    eigencache.probe(model, own.tokenizer, "stdlib", **FEW)
    eigencache.fit(model, own.tokenizer, "stdlib", bits=2.0, settings=EigenSettings("layer", "frobenius", text=False), **FEW)
    assert [module.training for module in model.modules()] == before
    assert not any(p.requires_grad for p in model.parameters())


def test_inside_nothing_of_the_caller_is_left() -> None:
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16), own_modes():
        x = torch.randn(3, 3) @ torch.randn(3, 3)
        assert x.dtype == torch.float32 and not x.is_inference()
