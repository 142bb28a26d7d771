"""Asymmetric integers in groups along the last dimension: the error is at most half a step, and nothing is clipped.

b bits per number, and lowest value and step of every group in float16: b + 32 / group bits per number.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from eigencache.codec.quantization.bitpack import pack, unpack
from eigencache.codec.quantization.grouped import low_and_step
from eigencache.errors import CodecError


class Groups(NamedTuple):
    """Codes [..., ⌈n·bits / 8⌉] uint8; low and step [..., ⌈n / group⌉] float16."""

    codes: Tensor
    low: Tensor
    step: Tensor


def quantized(x: Tensor, bits: int, group: int, what: str) -> Groups:
    """x [..., n] in groups of `group` numbers, of which the last may be narrower.

    Raises `CodecError`, beginning with `what`, for NaN and for numbers that float16 scales cannot hold.
    """
    refuse_non_finite(x, what)
    grouped = _grouped(x.float(), group)
    low, step = low_and_step(grouped, bits, -1)
    if not (low.isfinite().all() and step.isfinite().all()):
        raise CodecError(f"{what}: {float(x.abs().max()):.3g} does not fit into float16 scales")
    divisor = torch.where(step > 0, step, 1).float()[..., None]
    codes = ((grouped - low.float()[..., None]) / divisor).round().clamp(0, 2**bits - 1)
    return Groups(pack(codes.to(torch.uint8).flatten(-2)[..., : x.shape[-1]], bits), low, step)


def dequantized(groups: Groups, bits: int, count: int, group: int) -> Tensor:
    """The numbers [..., count] again, float32."""
    codes = _grouped(unpack(groups.codes, bits, count).float(), group)
    return (codes * groups.step.float()[..., None] + groups.low.float()[..., None]).flatten(-2)[..., :count]


def refuse_non_finite(x: Tensor, what: str) -> None:
    """Raises `CodecError`, beginning with `what`, for NaN and infinite values."""
    if not x.isfinite().all():
        raise CodecError(f"{what} holds NaN or infinite values")


def _grouped(x: Tensor, group: int) -> Tensor:
    """[..., groups, group], the last one filled up with its last number, which moves neither of its extremes."""
    missing = -x.shape[-1] % group
    if missing:
        x = torch.cat([x, x[..., -1:].expand(*x.shape[:-1], missing)], -1)
    return x.unflatten(-1, (-1, group))
