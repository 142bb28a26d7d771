"""fp8 in the format e4m3: one byte per number, magnitudes up to 448."""

import torch
from torch import Tensor

FP8_MAX = 448.0


def to_fp8(units: Tensor) -> Tensor:
    """Return the bytes, uint8, of numbers that have been divided by their scale; magnitudes beyond 448 saturate."""
    return units.clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn).view(torch.uint8)


def from_fp8(codes: Tensor) -> Tensor:
    """Return the numbers, float32, that `to_fp8` encoded, in units of the scale."""
    return codes.view(torch.float8_e4m3fn).float()
