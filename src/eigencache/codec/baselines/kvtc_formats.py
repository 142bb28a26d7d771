"""The number formats of `kvtc`: 2 or 4 bits uniform, or fp8, about a 16-bit shift and in units of a 16-bit scale.

A group of numbers has one shift and one scale. Integers: shift is the lowest value, scale the step, error at most half a
step. fp8 (e4m3): shift is the middle of the range, and half the range is 448 scales.
"""

import torch
from torch import Tensor

from eigencache.codec.quantization.grouped import low_and_step, scale_reaching
from eigencache.errors import CodecError

BITS = {"int2": 2, "int4": 4, "fp8": 8}
SCALE_BITS = 32  # a shift and a scale
_FP8_MAX = 448.0


def group_bits(kind: str, size: int) -> int:
    """What a group costs per token."""
    return BITS[kind] * size + SCALE_BITS


def shift_and_scale(x: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """Both in float16, of x [..., size]: [...]. Raises `CodecError` where float16 is too narrow."""
    if kind == "fp8":
        lowest, highest = x.amin(-1), x.amax(-1)
        shift = ((lowest + highest) / 2).half()
        largest = torch.maximum(highest - shift.float(), shift.float() - lowest)
        scale = scale_reaching(largest, _FP8_MAX)
    else:
        shift, scale = low_and_step(x, BITS[kind], -1)
    if not (shift.isfinite().all() and scale.isfinite().all()):
        raise CodecError(f"coefficients up to {float(x.abs().max()):.3g} do not fit into 16-bit shifts and scales")
    return shift, scale


def to_codes(x: Tensor, kind: str, shift: Tensor, scale: Tensor) -> Tensor:
    """Codes [..., size] in uint8."""
    units = (x - shift.float()[..., None]) / torch.where(scale > 0, scale, 1).float()[..., None]
    if kind == "fp8":
        return units.clamp(-_FP8_MAX, _FP8_MAX).to(torch.float8_e4m3fn).view(torch.uint8)
    return units.round().clamp(0, 2 ** BITS[kind] - 1).to(torch.uint8)


def from_codes(codes: Tensor, kind: str, shift: Tensor, scale: Tensor) -> Tensor:
    """The numbers again [..., size], float32."""
    units = codes.view(torch.float8_e4m3fn).float() if kind == "fp8" else codes.float()
    return units * scale.float()[..., None] + shift.float()[..., None]
