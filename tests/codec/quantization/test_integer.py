"""Symmetric int8 reaches the largest magnitude of every vector and errs by at most half a step."""

import pytest
import torch

from eigencache.codec.quantization.integer import INT8_MAX, from_int8, to_int8
from eigencache.errors import CodecError


def test_the_error_is_at_most_half_a_step_and_nothing_is_clipped() -> None:
    x = torch.randn(5, 7, 12, generator=torch.Generator().manual_seed(0)) * torch.logspace(-6, 3, 7)[:, None]
    codes, scale = to_int8(x, "x")
    assert (codes.dtype, scale.dtype, scale.shape) == (torch.int8, torch.float16, (5, 7, 1))
    assert codes.abs().max() == INT8_MAX
    assert ((from_int8(codes, scale) - x).abs() <= scale.float() / 2 * (1 + 1e-5)).all()


def test_zeros_come_back() -> None:
    assert not from_int8(*to_int8(torch.zeros(2, 3), "x")).any()


@pytest.mark.parametrize("worst", [torch.nan, torch.inf, 1e8])
def test_what_a_scale_cannot_hold_is_refused(worst: float) -> None:
    with pytest.raises(CodecError, match="keys of layer 3: magnitudes up to"):
        to_int8(torch.tensor([0.0, worst]), "keys of layer 3")
