"""The number formats of `kvtc`: 2-bit or 4-bit integers, or fp8, with a 16-bit shift and a 16-bit scale per group.

Integers: the shift is the lowest value, the scale is the step, the error is at most half a step. fp8 (e4m3): the shift is
the middle of the range, and half the range is 448 scales.
"""

import torch
from torch import Tensor

from eigencache.codec.quantization.fp8 import FP8_MAX, from_fp8, to_fp8
from eigencache.codec.quantization.scales import divisor, low_and_step, scale_reaching
from eigencache.errors import CodecError

BITS = {"int2": 2, "int4": 4, "fp8": 8}
SCALE_BITS = 32  # a shift and a scale


def group_bits(kind: str, size: int) -> int:
    """Return the bits per token of a group of `size` components in a format."""
    return BITS[kind] * size + SCALE_BITS


def shift_and_scale(x: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """Return shift and scale [...] in float16 of groups x [..., size].

    Raises:
        CodecError: float16 is too narrow for them.
    """
    if kind == "fp8":
        lowest, highest = x.amin(-1), x.amax(-1)
        shift = ((lowest + highest) / 2).half()
        largest = torch.maximum(highest - shift.float(), shift.float() - lowest)
        scale = scale_reaching(largest, FP8_MAX)
    else:
        shift, scale = low_and_step(x, BITS[kind], -1)
    if not (shift.isfinite().all() and scale.isfinite().all()):
        raise CodecError(f"coefficients up to {float(x.abs().max()):.3g} do not fit into 16-bit shifts and scales")
    return shift, scale


def to_codes(x: Tensor, kind: str, shift: Tensor, scale: Tensor) -> Tensor:
    """Return the codes, uint8 [..., size], of groups.

    Args:
        x: Groups [..., size].
        kind: A key of `BITS`.
        shift: Shifts [...] in float16.
        scale: Scales [...] in float16.
    """
    units = (x - shift.float()[..., None]) / divisor(scale)[..., None]
    if kind == "fp8":
        return to_fp8(units)
    return units.round().clamp(0, 2 ** BITS[kind] - 1).to(torch.uint8)


def from_codes(codes: Tensor, kind: str, shift: Tensor, scale: Tensor) -> Tensor:
    """Return the numbers, float32 [..., size], of codes; the arguments are those of `to_codes`."""
    units = from_fp8(codes) if kind == "fp8" else codes.float()
    return units * scale.float()[..., None] + shift.float()[..., None]
