"""Encode keys or values to packed bytes on a GPU in one pass: project, quantize and pack without intermediate results.

One program packs one block of one bundle. It computes integers that share bytes together, in the precision of float32 by
three products in tf32 (Ampere and later). A rotated mean is subtracted, computed from the angles of the block's first token
and a table of its 64 tokens.
"""

# Triton specializes arguments, so the checker sees the wrong types here.
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false, reportIndexIssue=false
# pyright: reportAttributeAccessIssue=false, reportGeneralTypeIssues=false

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from eigencache.kernels.packed.format import BLOCK, Widths
from eigencache.kernels.packed.reference import RotatedMean
from eigencache.kernels.packed.triton.tiles import padded
from eigencache.modes import constant

_BLOCK = tl.constexpr(BLOCK)
_ROUND = tl.constexpr(1.5 * 2.0**23)  # adding and subtracting it rounds to the nearest integer, ties to even


def encode(
    x: Tensor,
    mean: Tensor,
    encoder: Tensor,
    widths: tuple[Widths, ...],
    six: tuple[int, ...] = (),
    rotated_mean: RotatedMean | None = None,
) -> Tensor:
    """Return the result of `reference.encode`; integers may differ by one where a sum in float32 is near a half."""
    batch, _, tokens, dim = x.shape
    blocks, bundles = tokens // BLOCK, len(widths)
    out = torch.empty(batch, blocks, sum(w.nbytes for w in widths), dtype=torch.uint8, device=x.device)
    if not out.numel():
        return out
    inner = encoder.shape[2]
    tensors = [t.float().contiguous() for t in (mean, encoder)]
    mean_parts: tuple[Tensor | None, ...] = (None,) * 4
    if rotated_mean is not None:
        mean_parts = rotated_mean.still, rotated_mean.quarter, rotated_mean.starts, rotated_mean.table
    factors = [None if t is None else t.contiguous() for t in mean_parts]
    sizes = blocks, bundles, inner, dim, batch * blocks * dim, encoder.shape[1]
    wide = x.device.type == "cuda" and torch.cuda.get_device_capability(x.device) >= (9, 0)  # products of four warps (wgmma)
    constants = {"K": min(64, padded(inner)), "R": 64 if wide else 32, "num_warps": 4, "num_stages": 1}
    counts = _counts(widths, six, x.device)
    with torch.cuda.device_of(x):
        _encode[(batch * bundles * blocks,)](
            x, *tensors, counts, *factors, out, *x.stride(), *out.stride()[:2], *sizes, **constants
        )
    return out


@lru_cache(maxsize=1024)
@constant
def _counts(widths: tuple[Widths, ...], six: tuple[int, ...], device: torch.device) -> Tensor:
    """Return, per bundle, its first byte in a block and its coefficients of 8, 4, 2 and 6 bits, int32 [bundles, 5]."""
    counts, first_byte = [], 0
    for w, six_bits in zip(widths, six or (0,) * len(widths), strict=True):
        counts.append((first_byte, w.eight, w.four, w.two, six_bits))
        first_byte += w.nbytes
    return torch.tensor(counts, dtype=torch.int32, device=device)


@triton.jit
def _high(x):
    """Return x truncated to tf32: sign, exponent and 10 bits of the mantissa."""
    return (x.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)


@triton.jit
def _integers(
    x, mean, encoder, still, quarter, starts, table, row, rows, bits, six, six_stop,
    token_stride, head_stride, dim_stride, inner, dim, starts_size,
    K: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """Compute the integers [R, 64] of rows of the encoder for one block; rows `six` … `six_stop` are digits of 6 bits."""
    t = tl.arange(0, _BLOCK)
    y = tl.zeros((R, _BLOCK), tl.float32)
    for first in range(0, inner, K):
        k = first + tl.arange(0, K)
        head, number = k // dim, k % dim
        z = tl.load(
            x + (head.to(tl.int64) * head_stride + number * dim_stride)[:, None] + (t * token_stride)[None, :],
            mask=(k < inner)[:, None],
            other=0.0,
        ).to(tl.float32)
        z -= tl.load(mean + k, mask=k < inner, other=0.0)[:, None]
        if still is not None:
            a = tl.load(still + k, mask=k < inner, other=0.0)
            b = tl.load(quarter + k, mask=k < inner, other=0.0)
            cos = tl.load(starts + number, mask=k < inner, other=0.0)
            sin = tl.load(starts + starts_size + number, mask=k < inner, other=0.0)
            offset = (number * _BLOCK)[:, None] + t[None, :]
            z -= (a * cos + b * sin)[:, None] * tl.load(table + offset, mask=(k < inner)[:, None], other=0.0)
            z -= (b * cos - a * sin)[:, None] * tl.load(table + dim * _BLOCK + offset, mask=(k < inner)[:, None], other=0.0)
        e = tl.load(
            encoder + row[:, None] * inner + k[None, :], mask=(row < rows)[:, None] & (k < inner)[None, :], other=0.0
        )
        e_high, z_high = _high(e), _high(z)
        y = tl.dot(e - e_high, z_high, y, input_precision="tf32")
        y = tl.dot(e_high, z - z_high, y, input_precision="tf32")
        y = tl.dot(e_high, z_high, y, input_precision="tf32")
    largest = (1 << bits) - 1
    digit = ((row >= six) & (row < six_stop))[:, None]
    most = tl.where(digit, 63.0, largest.to(tl.float32))
    y = tl.minimum(tl.maximum(y + most * 0.5, 0.0), most)
    u = ((y + _ROUND) - _ROUND).to(tl.int32)
    return tl.where(digit & (bits == 4), u >> 2, u) & largest


@triton.jit
def _encode(
    x, mean, encoder, counts, still, quarter, starts, table, out,
    batch_stride, head_stride, token_stride, dim_stride, out_batch_stride, out_block_stride,
    blocks, bundles, inner, dim, starts_size, most,
    K: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """Encode one block of one bundle: byte rows of 8 bits, then of 4 bits, then of 2 bits."""
    block = tl.program_id(0) % blocks
    bundle = tl.program_id(0) // blocks % bundles
    batch = (tl.program_id(0) // blocks // bundles).to(tl.int64)
    x += batch * batch_stride + (bundle * (inner // dim)).to(tl.int64) * head_stride
    x += block.to(tl.int64) * _BLOCK * token_stride
    mean += bundle * inner
    encoder += bundle * most * inner
    if still is not None:
        still += bundle * inner
        quarter += bundle * inner
        starts += (batch * blocks + block) * dim
    out += batch * out_batch_stride + block * out_block_stride.to(tl.int64) + tl.load(counts + 5 * bundle)
    six_bits = tl.load(counts + 5 * bundle + 4)
    six = tl.load(counts + 5 * bundle + 1) + tl.load(counts + 5 * bundle + 2) - six_bits
    coefficient = 0
    t = tl.arange(0, _BLOCK)
    for width in tl.static_range(3):
        bits = 8 >> width
        count = tl.load(counts + 5 * bundle + 1 + width)
        rows = count // (1 << width)
        for first in range(0, rows, R):
            row = first + tl.arange(0, R)
            packed = tl.zeros((R, _BLOCK), tl.int32)
            for part in tl.static_range(1 << width):
                begin = coefficient + part * rows
                u = _integers(
                    x, mean, encoder, still, quarter, starts, table, begin + row, begin + rows, bits, six,
                    six + 2 * six_bits, token_stride, head_stride, dim_stride, inner, dim, starts_size, K, R,
                )  # fmt: skip
                packed |= u << (part * bits)
            tl.store(out + row[:, None] * _BLOCK + t[None, :], packed.to(tl.uint8), mask=(row < rows)[:, None])
        out += rows * _BLOCK
        coefficient += count
