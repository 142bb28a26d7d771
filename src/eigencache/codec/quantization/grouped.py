"""Asymmetric integers in groups along one dimension: the error is at most half a step, and nothing is clipped.

A group has a lowest value and a step, both stored in float16, so b bits per number cost b + 32 / group bits. The extremes
of a group are code 0 and code 2^b − 1. Codes are packed along the last dimension.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from eigencache.codec.quantization.bitpack import pack, unpack
from eigencache.codec.quantization.scales import divisor, low_and_step
from eigencache.errors import CodecError

GROUP = 64  # numbers that share lowest value and step


class QuantizedGroups(NamedTuple):
    """Packed codes uint8 [..., ⌈n·bits / 8⌉], and `low` and `step` in float16, one per group along the grouped dimension."""

    codes: Tensor
    low: Tensor
    step: Tensor


def quantize(x: Tensor, bits: int, group: int = GROUP, *, dim: int = -1, what: str = "the cache") -> QuantizedGroups:
    """Quantize numbers in groups of neighbors along one dimension.

    Args:
        x: Numbers [..., n] in any floating-point dtype.
        bits: Bits per code: 1, 2, 3, 4 or 8.
        group: Numbers per group; the last group of a dimension may be smaller.
        dim: The grouped dimension, counted from the end (−1 is the last).
        what: What the numbers are, to begin an error message.

    Raises:
        CodecError: `x` holds NaN, infinite values, or values that float16 scales cannot represent.
    """
    require_finite(x, what)
    grouped = _grouped(x.float(), group, dim)
    low, step = low_and_step(grouped, bits, dim)
    if not (low.isfinite().all() and step.isfinite().all()):
        raise CodecError(f"{what}: values up to {float(x.abs().max()):.3g} do not fit into float16 scales")
    codes = ((grouped - low.float().unsqueeze(dim)) / divisor(step).unsqueeze(dim)).round().clamp(0, 2**bits - 1)
    codes = codes.to(torch.uint8).flatten(dim - 1, dim).narrow(dim, 0, x.shape[dim])
    return QuantizedGroups(pack(codes, bits), low, step)


def dequantize(quantized: QuantizedGroups, bits: int, count: int, group: int = GROUP, *, dim: int = -1) -> Tensor:
    """Return the numbers [..., count] in float32.

    Args:
        quantized: What `quantize` returned.
        bits: Bits per code.
        count: Size of the last dimension.
        group: Numbers per group.
        dim: The grouped dimension, counted from the end.
    """
    codes = unpack(quantized.codes, bits, count).float()
    size = codes.shape[dim]
    low, step = (part.float().unsqueeze(dim) for part in (quantized.low, quantized.step))
    numbers = (_grouped(codes, group, dim) * step + low).flatten(dim - 1, dim).narrow(dim, 0, size)
    return numbers if dim == -1 else numbers.contiguous()


def require_finite(x: Tensor, what: str) -> None:
    """Raise `CodecError`, beginning with `what`, for NaN and infinite values."""
    if not x.isfinite().all():
        raise CodecError(f"{what} holds NaN or infinite values")


def _grouped(x: Tensor, group: int, dim: int) -> Tensor:
    """Split a dimension into [groups, group]; the last number is repeated, which moves neither extreme of its group."""
    missing = -x.shape[dim] % group
    if missing:
        shape = list(x.shape)
        shape[dim] = missing
        x = torch.cat([x, x.narrow(dim, x.shape[dim] - 1, 1).expand(shape)], dim)
    return x.unflatten(dim, (-1, group))
