"""Grouped integers take the bytes they should, clip nothing, and err by at most half a step, along either dimension."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eigencache.codec.quantization.grouped import GROUP, dequantize, quantize
from eigencache.errors import CodecError


@settings(max_examples=60, deadline=None)
@given(
    bits=st.sampled_from([4, 8]),
    seq=st.integers(1, 150),
    rank=st.integers(1, 9),
    seed=st.integers(0, 1000),
    scale=st.sampled_from([1e-3, 1.0, 300.0]),
)
def test_the_error_is_at_most_half_a_step_along_tokens(bits, seq, rank, seed, scale) -> None:
    y = scale * torch.randn(2, seq, rank, generator=torch.Generator().manual_seed(seed)) ** 3
    stored = quantize(y, bits, dim=-2)
    again = dequantize(stored, bits, rank, dim=-2)
    half_a_step = stored.step.float().repeat_interleave(GROUP, 1)[:, :seq] / 2
    assert ((again - y).abs() <= half_a_step * (1 + 1e-4) + 1e-6 * scale).all()
    assert again.is_contiguous()


@settings(max_examples=60, deadline=None)
@given(
    bits=st.sampled_from([2, 3, 4, 8]),
    count=st.integers(1, 70),
    group=st.sampled_from([1, 8, 32, 64]),
    scale=st.sampled_from([1e-3, 1.0, 300.0]),
    seed=st.integers(0, 1000),
)
def test_the_error_is_at_most_half_a_step_along_the_last_dimension(bits, count, group, scale, seed) -> None:
    x = scale * torch.randn(2, 3, count, generator=torch.Generator().manual_seed(seed)) ** 3
    stored = quantize(x, bits, group)
    groups = -(-count // group)
    assert stored.codes.shape == (2, 3, -(-count * bits // 8))
    assert stored.low.shape == stored.step.shape == (2, 3, groups)
    assert stored.low.dtype == stored.step.dtype == torch.float16
    half_a_step = stored.step.float().repeat_interleave(group, -1)[..., :count] / 2
    error = (dequantize(stored, bits, count, group) - x).abs()
    assert (error <= half_a_step * (1 + 1e-4) + 1e-6 * x.abs()).all()


@pytest.mark.parametrize(("bits", "rank", "width"), [(8, 5, 5), (4, 5, 3), (4, 6, 3)])
def test_codes_take_the_bytes_they_should(bits: int, rank: int, width: int) -> None:
    stored = quantize(torch.randn(3, 100, rank), bits, dim=-2)
    assert stored.codes.dtype == torch.uint8
    assert stored.codes.shape == (3, 100, width)
    assert stored.codes.untyped_storage().nbytes() == 300 * width
    assert stored.low.shape == stored.step.shape == (3, 2, rank)
    assert stored.low.dtype == stored.step.dtype == torch.float16


def test_constants_and_zeros_come_back() -> None:
    x = torch.tensor([[0.25] * 5, [0.0] * 5])
    assert torch.equal(dequantize(quantize(x, 2, 4), 2, 5, 4), x)
    y = torch.full((1, 70, 2), 0.25)
    assert torch.equal(dequantize(quantize(y, 4, dim=-2), 4, 2, dim=-2), y)


def test_eight_bits_are_closer_than_four() -> None:
    y = torch.randn(1, 200, 8)
    errors = {bits: float((dequantize(quantize(y, bits, dim=-2), bits, 8, dim=-2) - y).abs().mean()) for bits in (4, 8)}
    assert errors[8] < errors[4] / 8


@pytest.mark.parametrize("dim", [-1, -2])
@pytest.mark.parametrize(
    ("worst", "words"), [(torch.nan, "layer 7 holds NaN or infinite"), (1e9, r"layer 7: values up to 1e\+09 do not fit")]
)
def test_what_cannot_be_stored_is_refused_with_its_name(worst: float, words: str, dim: int) -> None:
    with pytest.raises(CodecError, match=words):
        quantize(torch.tensor([[0.0, worst], [0.0, 0.0]]), 4, 2, dim=dim, what="layer 7")
