"""Scales in float16 are rounded so that the largest code reaches every number."""

import torch

from eigencache.codec.quantization.scales import divisor, low_and_step, scale_reaching


def test_scales_reach_the_largest_magnitude() -> None:
    largest = torch.logspace(-7, 6, 1000)
    scale = scale_reaching(largest, 127)
    assert scale.dtype == torch.float16
    assert (scale.float() * 127 >= largest).all()
    assert scale_reaching(torch.tensor([1e9]), 127).isinf().all()


def test_the_lowest_and_highest_value_are_within_reach() -> None:
    x = torch.randn(50, 9, generator=torch.Generator().manual_seed(0)) * 30
    low, step = low_and_step(x, 2, -1)
    assert (low.float() <= x.amin(-1)).all()
    assert (low.float() + 3 * step.float() >= x.amax(-1)).all()


def test_a_scale_of_zero_divides_as_one() -> None:
    assert divisor(torch.tensor([0.0, 0.5]).half()).tolist() == [1.0, 0.5]
