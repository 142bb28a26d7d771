"""Asymmetric uniform quantization with real packing: 8 bits take one byte per number, 4 bits half a byte.

Per group of consecutive tokens and per coefficient: lowest value and step in float16, both stored. No value is
clipped: the group's extremes are code 0 and code 2^b − 1. The error is at most half a step and the rounding of the
step itself.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from eigencache.codec.quantization.bitpack import pack, unpack
from eigencache.errors import CodecError

GROUP = 64  # tokens that share lowest value and step


class QuantizedGroups(NamedTuple):
    """Codes [batch, seq, ⌈r·bits/8⌉] uint8, low and step [batch, groups, r] float16."""

    codes: Tensor
    low: Tensor
    step: Tensor


def quantize(y: Tensor, bits: int, group: int = GROUP) -> QuantizedGroups:
    """Quantize coefficients [batch, seq, r] to 8 or 4 bits. Raises `CodecError` for other widths and for non-finite y."""
    if bits not in (4, 8):
        raise CodecError(f"{bits}-bit coefficients: 16, 8 or 4 are stored")
    if not y.isfinite().all():
        raise CodecError("coefficients hold NaN or infinite values: the cache that was given does")
    batch, seq, rank = y.shape
    groups = -(-seq // group)
    padded = torch.cat([y, y[:, -1:].expand(batch, groups * group - seq, rank)], 1).unflatten(1, (groups, group)).float()
    low, step = low_and_step(padded, bits, 2)
    if not (low.isfinite().all() and step.isfinite().all()):
        raise CodecError(f"coefficients up to {float(y.abs().max()):.3g} do not fit into float16 scales")
    divisor = torch.where(step > 0, step, 1).float()[:, :, None]
    codes = ((padded - low.float()[:, :, None]) / divisor).round().clamp(0, 2**bits - 1)
    codes = codes.to(torch.uint8).flatten(1, 2)[:, :seq]
    return QuantizedGroups(pack(codes, bits), low, step)


def dequantize(quantized: QuantizedGroups, bits: int, rank: int, group: int = GROUP) -> Tensor:
    """Coefficients [batch, seq, rank] again, float32."""
    codes = unpack(quantized.codes, bits, rank)
    seq = codes.shape[1]
    low, step = (part.float().repeat_interleave(group, dim=1)[:, :seq] for part in (quantized.low, quantized.step))
    return codes.float() * step + low


def low_and_step(x: Tensor, bits: int, dim: int) -> tuple[Tensor, Tensor]:
    """Lowest value and step along `dim` in float16, rounded so that 2^bits codes reach every number of float32 x.

    Infinite where float16 is too narrow.
    """
    lowest, highest = x.amin(dim), x.amax(dim)
    low = lowest.half()
    low = torch.where(low.float() > lowest, below(low), low)
    return low, scale_reaching(highest - low.float(), 2**bits - 1)


def scale_reaching(largest: Tensor, levels: float) -> Tensor:
    """`largest / levels` in float16, rounded so that `levels` of it reach every number of float32 `largest`."""
    scale = (largest / levels).half()
    return torch.where(scale.float() * levels < largest, above(scale), scale)


def above(x: Tensor) -> Tensor:
    """The next number above, in x's own dtype."""
    return torch.nextafter(x, torch.full_like(x, torch.inf))


def below(x: Tensor) -> Tensor:
    """The next number below, in x's own dtype."""
    return torch.nextafter(x, torch.full_like(x, -torch.inf))
