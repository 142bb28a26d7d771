"""Asymmetric groups err by at most half a step, clip nothing, and take the bits they should."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eigencache.codec.baselines.asymmetric import dequantized, quantized
from eigencache.errors import CodecError


@settings(max_examples=60, deadline=None)
@given(
    bits=st.sampled_from([2, 3, 4, 8]),
    count=st.integers(1, 70),
    group=st.sampled_from([1, 8, 32, 64]),
    scale=st.sampled_from([1e-3, 1.0, 300.0]),
    seed=st.integers(0, 1000),
)
def test_the_error_is_at_most_half_a_step_of_its_group(bits, count, group, scale, seed) -> None:
    x = scale * torch.randn(2, 3, count, generator=torch.Generator().manual_seed(seed)) ** 3
    stored = quantized(x, bits, group, "layer 0")
    groups = -(-count // group)
    assert stored.codes.shape == (2, 3, -(-count * bits // 8))
    assert stored.low.shape == stored.step.shape == (2, 3, groups)
    assert stored.low.dtype == stored.step.dtype == torch.float16
    half_a_step = stored.step.float().repeat_interleave(group, -1)[..., :count] / 2
    error = (dequantized(stored, bits, count, group) - x).abs()
    assert (error <= half_a_step * (1 + 1e-4) + 1e-6 * x.abs()).all()


def test_constants_and_zeros_come_back() -> None:
    x = torch.tensor([[0.25] * 5, [0.0] * 5])
    assert torch.equal(dequantized(quantized(x, 2, 4, ""), 2, 5, 4), x)


@pytest.mark.parametrize(("worst", "words"), [(torch.nan, "layer 7 holds NaN"), (1e9, "layer 7: 1e\\+09 does not fit")])
def test_what_cannot_be_stored_is_refused_with_its_name(worst: float, words: str) -> None:
    with pytest.raises(CodecError, match=words):
        quantized(torch.tensor([0.0, worst]), 4, 2, "layer 7")
