"""Scales and offsets in float16, rounded away from the values, so that quantization never clips one."""

import torch
from torch import Tensor


def scale_reaching(largest: Tensor, levels: float) -> Tensor:
    """Return the smallest float16 scale whose `levels`-fold reaches `largest`.

    Args:
        largest: Magnitudes in float32, any shape.
        levels: The largest code, such as 127 for int8.

    Returns:
        Scales in float16 with the shape of `largest`; infinite where float16 is too narrow.
    """
    scale = (largest / levels).half()
    return torch.where(scale.float() * levels < largest, above(scale), scale)


def low_and_step(x: Tensor, bits: int, dim: int) -> tuple[Tensor, Tensor]:
    """Return the lowest value and the step of asymmetric integers along one dimension.

    Args:
        x: Values in float32.
        bits: Bits of a code; 2^bits codes reach from the lowest to the highest value.
        dim: The dimension whose values share lowest value and step.

    Returns:
        Both in float16 without dimension `dim`; infinite where float16 is too narrow.
    """
    lowest, highest = x.amin(dim), x.amax(dim)
    low = lowest.half()
    low = torch.where(low.float() > lowest, below(low), low)
    return low, scale_reaching(highest - low.float(), 2**bits - 1)


def divisor(scale: Tensor) -> Tensor:
    """Return the scale in float32, with 1 in place of 0, so that values that are all 0 can be divided by it."""
    return torch.where(scale > 0, scale, 1).float()


def above(x: Tensor) -> Tensor:
    """Return the next larger number in the dtype of x."""
    return torch.nextafter(x, torch.full_like(x, torch.inf))


def below(x: Tensor) -> Tensor:
    """Return the next smaller number in the dtype of x."""
    return torch.nextafter(x, torch.full_like(x, -torch.inf))
