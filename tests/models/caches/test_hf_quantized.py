"""The cache of transformers is filled as a prefill fills it, and its bytes are codes, scales, zeros and residual."""

from dataclasses import replace

import pytest
import torch

from eigencache.codec.base import SixteenBit
from eigencache.evaluate.prefix import read_prefix
from eigencache.models.caches import hf_quantized
from eigencache.models.caches.hf_quantized import Quantized, refusal, unpacked
from stub_codecs import tiny_loaded
from tiny_models import tiny, token_ids

POINTS = [("quanto", 4, 0), ("quanto", 2, 0), *(("hqq", bits, axis) for bits in (8, 4, 2) for axis in (0, 1))]
ROWS, TOKENS = 2, 16
NUMBERS = ROWS * TOKENS * 3 * 2 * 2 * 16  # layers, slots, KV heads, head_dim


@pytest.fixture(params=POINTS, ids=lambda point: " ".join(map(str, point)))
def made(request) -> Quantized:
    if why := refusal(request.param[0], tiny("llama")):
        pytest.skip(why)
    return Quantized(*request.param)


@torch.no_grad()
def test_its_bytes_are_codes_scales_and_zeros_and_its_residual_behind_a_prefix_is_empty(made: Quantized) -> None:
    prefix = read_prefix(tiny_loaded("llama"), token_ids()[:, :TOKENS])
    cache = made.cache_of(prefix)
    codes, scales_and_zeros = NUMBERS * made.bits // 8, NUMBERS // 64 * 2 * 2
    assert made.held(cache) == (ROWS * TOKENS, codes + scales_and_zeros)
    assert cache.get_seq_length() == TOKENS
    prefix.loaded.model(input_ids=token_ids()[:, TOKENS : TOKENS + 3], past_key_values=cache)
    residual = ROWS * 3 * 3 * 2 * 2 * 16 * 4  # three tokens in the model's 32 bits
    assert made.held(cache) == (ROWS * (TOKENS + 3), codes + scales_and_zeros + residual)


@torch.no_grad()
def test_what_is_read_through_it_is_what_it_dequantizes_to_near_the_prefix(made: Quantized) -> None:
    ids = token_ids()
    prefix = read_prefix(tiny_loaded("llama"), ids[:, :TOKENS])
    layers = made.cache_of(prefix).layers
    back = {
        i: tuple(layer._dequantize(x).float() for x in (layer._quantized_keys, layer._quantized_values))
        for i, layer in enumerate(layers)
    }
    found = prefix.logits(ids[:, TOKENS:], made)
    torch.testing.assert_close(found, replace(prefix, stored=back).logits(ids[:, TOKENS:], None), atol=1e-4, rtol=1e-4)
    assert not torch.equal(found, prefix.logits(ids[:, TOKENS:], SixteenBit()))
    keys = prefix.stored[0][0]
    assert 0 < float((back[0][0] - keys).abs().max()) < float(keys.abs().max()) * 4 / 2**made.bits


@torch.no_grad()
def test_an_empty_prefix_holds_nothing(made: Quantized) -> None:
    prefix = read_prefix(tiny_loaded("llama"), token_ids()[:, :0])
    assert made.held(made.cache_of(prefix)) == (0, 0)


def test_what_cannot_have_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    if hf_quantized._AVAILABLE["hqq"]():
        assert "only supported for models with only full attention" in str(refusal("hqq", tiny("gemma3_text")))
    monkeypatch.setitem(hf_quantized._AVAILABLE, "hqq", lambda: False)
    assert refusal("hqq", tiny("llama")) == "the package hqq is not installed: install 'eigencache[peers]'"


@pytest.mark.parametrize("bits", [2, 4])
def test_codes_are_unpacked_as_they_were_packed(bits: int) -> None:
    packed = pytest.importorskip("optimum.quanto.tensor.packed", reason="optimum-quanto is not installed")
    codes = torch.randint(0, 2**bits, (8, 5), dtype=torch.uint8)
    assert torch.equal(unpacked(packed.pack_weights(codes, bits), bits), codes)
