"""Asymmetric uniform quantisation with real packing: 8 bits take one byte per number, 4 bits half a byte.

Per group of consecutive tokens and per coefficient: lowest value and step in float16, both stored. No value is
clipped: the group's extremes are code 0 and code 2^b − 1. The error is at most half a step and the rounding of the
step itself.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from eigencache.codec.base import owned
from eigencache.errors import CodecError

GROUP = 64  # tokens that share lowest value and step


class Quantised(NamedTuple):
    """Codes [batch, seq, ⌈r·bits/8⌉] uint8, low and step [batch, groups, r] float16."""

    codes: Tensor
    low: Tensor
    step: Tensor


def quantise(y: Tensor, bits: int, group: int = GROUP) -> Quantised:
    """Quantise coefficients [batch, seq, r] to 8 or 4 bits. Raises `CodecError` for other widths and for non-finite y."""
    if bits not in (4, 8):
        raise CodecError(f"{bits}-bit coefficients: 16, 8 or 4 are stored")
    if not y.isfinite().all():
        raise CodecError("coefficients hold NaN or infinite values: the cache that was given does")
    batch, seq, rank = y.shape
    groups = -(-seq // group)
    padded = torch.cat([y, y[:, -1:].expand(batch, groups * group - seq, rank)], 1).unflatten(1, (groups, group)).float()
    low = padded.amin(2).half()
    low = torch.where(low.float() > padded.amin(2), _below(low), low)
    step = ((padded.amax(2) - low.float()) / (2**bits - 1)).half()
    step = torch.where(step.float() * (2**bits - 1) < padded.amax(2) - low.float(), _above(step), step)
    if not (low.isfinite().all() and step.isfinite().all()):
        raise CodecError(f"coefficients up to {float(y.abs().max()):.3g} do not fit into float16 scales")
    divisor = torch.where(step > 0, step, 1).float()[:, :, None]
    codes = ((padded - low.float()[:, :, None]) / divisor).round().clamp(0, 2**bits - 1)
    codes = codes.to(torch.uint8).flatten(1, 2)[:, :seq]
    return Quantised(_packed(codes) if bits == 4 else owned(codes), low, step)


def dequantise(quantised: Quantised, bits: int, rank: int, group: int = GROUP) -> Tensor:
    """Coefficients [batch, seq, rank] again, float32."""
    codes = _unpacked(quantised.codes, rank) if bits == 4 else quantised.codes
    seq = codes.shape[1]
    low, step = (part.float().repeat_interleave(group, dim=1)[:, :seq] for part in (quantised.low, quantised.step))
    return codes.float() * step + low


def _packed(codes: Tensor) -> Tensor:
    codes = F.pad(codes, (0, codes.shape[-1] % 2))
    return (codes[..., ::2] | (codes[..., 1::2] << 4)).contiguous()


def _unpacked(codes: Tensor, rank: int) -> Tensor:
    return torch.stack((codes & 15, codes >> 4), -1).flatten(-2)[..., :rank]


def _above(x: Tensor) -> Tensor:
    return torch.nextafter(x, torch.full_like(x, torch.inf))


def _below(x: Tensor) -> Tensor:
    return torch.nextafter(x, torch.full_like(x, -torch.inf))
