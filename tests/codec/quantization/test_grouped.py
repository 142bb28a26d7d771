"""Codes take the bytes they should, nothing is clipped, and the error is at most half a step."""

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
def test_the_error_is_at_most_half_a_step_and_nothing_is_clipped(bits, seq, rank, seed, scale) -> None:
    y = scale * torch.randn(2, seq, rank, generator=torch.Generator().manual_seed(seed)) ** 3
    stored = quantize(y, bits)
    error = (dequantize(stored, bits, rank) - y).abs()
    half_a_step = stored.step.float().repeat_interleave(GROUP, 1)[:, :seq] / 2
    assert (error <= half_a_step * (1 + 1e-4) + 1e-6 * scale).all()


@pytest.mark.parametrize(("bits", "rank", "width"), [(8, 5, 5), (4, 5, 3), (4, 6, 3)])
def test_codes_take_the_bytes_they_should(bits: int, rank: int, width: int) -> None:
    stored = quantize(torch.randn(3, 100, rank), bits)
    assert stored.codes.dtype == torch.uint8
    assert stored.codes.shape == (3, 100, width)
    assert stored.codes.untyped_storage().nbytes() == 300 * width
    assert stored.low.shape == stored.step.shape == (3, 2, rank)
    assert stored.low.dtype == stored.step.dtype == torch.float16


def test_a_coefficient_that_never_changes_comes_back() -> None:
    y = torch.full((1, 70, 2), 0.25)
    assert torch.equal(dequantize(quantize(y, 4), 4, 2), y)


def test_eight_bits_are_closer_than_four() -> None:
    y = torch.randn(1, 200, 8)
    errors = {bits: float((dequantize(quantize(y, bits), bits, 8) - y).abs().mean()) for bits in (4, 8)}
    assert errors[8] < errors[4] / 8


@pytest.mark.parametrize(
    ("y", "bits", "words"),
    [
        (torch.randn(1, 4, 2), 3, "3-bit coefficients: 16, 8 or 4 are stored"),
        (torch.tensor([[[torch.nan]]]), 8, "NaN or infinite"),
        (torch.tensor([[[1e9], [0.0]]]), 8, "do not fit into float16"),
    ],
)
def test_what_cannot_be_stored_is_refused(y: torch.Tensor, bits: int, words: str) -> None:
    with pytest.raises(CodecError, match=words):
        quantize(y, bits)
