"""Logits and weighted sums as separate launches, for attention whose mask is not a range of tokens.

Queries and weights in float32 become sums of two float16 numbers, which keeps the precision of float32; those in 16 bits
become one float16 number.
"""

# Triton specializes arguments, so the checker sees the wrong types here.
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false, reportIndexIssue=false
# pyright: reportAttributeAccessIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from eigencache.kernels.packed.format import BLOCK, Widths, most_coefficients
from eigencache.kernels.packed.triton.queries import prepare_queries
from eigencache.kernels.packed.triton.tiles import (
    UNIT,
    accumulate,
    add_products,
    halves,
    integers,
    load_halves,
    load_words,
    places,
    power_below,
    words_of,
)

_BLOCK = tl.constexpr(BLOCK)
_BLOCKS = 16  # blocks of a program


def logits(packed: Tensor, widths: tuple[Widths, ...], queries: Tensor) -> Tensor:
    """Return the result of `reference.logits`."""
    batch, bundles, rows, _ = queries.shape
    blocks, tile = packed.shape[1], _row_tile(rows)
    out = torch.empty(batch, bundles, rows, blocks * BLOCK, device=packed.device)
    if not out.numel():
        return out
    words, place = words_of(packed), places(widths, 1, packed.device)
    grid = (batch * bundles * triton.cdiv(rows, tile), triton.cdiv(blocks, _BLOCKS))
    ready = prepare_queries(queries, place, _exact(queries))
    tensors = words, place, ready.halves, ready.slope, ready.added, out
    sizes = bundles, rows, words.stride(0), words.shape[2], blocks, _BLOCKS
    constants = {"M": tile, "C": place.shape[1], "TERMS": 1 + _exact(queries), "num_warps": _warps(tile)}
    with torch.cuda.device_of(packed):
        _logits[grid](*tensors, *sizes, **constants)
    return out


def sums(packed: Tensor, widths: tuple[Widths, ...], weights: Tensor) -> Tensor:
    """Return the result of `reference.sums`."""
    batch, bundles, rows, _ = weights.shape
    blocks, tile, most = packed.shape[1], _row_tile(rows), most_coefficients(widths)
    splits = triton.cdiv(blocks, _BLOCKS)
    out = torch.empty(splits, batch, bundles, rows, most, device=packed.device)
    if not out.numel():
        return out.new_zeros(batch, bundles, rows, most)
    words, place = words_of(packed), places(widths, 1, packed.device)
    largest = weights.abs().amax(-1).float()
    grid = (batch * bundles * triton.cdiv(rows, tile), splits)
    sizes = bundles, rows, most, words.stride(0), words.shape[2], blocks, _BLOCKS
    constants = {"M": tile, "C": place.shape[1], "TERMS": 1 + _exact(weights), "num_warps": _warps(tile)}
    with torch.cuda.device_of(packed):
        _sums[grid](words, place, weights.contiguous(), largest, out, *sizes, **constants)
    return out[0] if splits == 1 else out.sum(0)


def _row_tile(rows: int) -> int:
    return min(max(8, triton.next_power_of_2(rows)), 64)


def _warps(tile: int) -> int:
    return 4 if tile <= 32 else 8


def _exact(x: Tensor) -> bool:
    return x.dtype not in (torch.float16, torch.bfloat16)


@triton.jit
def _logits(
    words, place, queries, slopes, added, out, bundles, rows, batch_stride, stride, blocks, each,
    M: tl.constexpr, C: tl.constexpr, TERMS: tl.constexpr,
):  # fmt: skip
    """Store logits `out` [items, rows, tokens] of `queries` [terms, items, rows, C]: one item, M rows, `each` blocks."""
    tiles = tl.cdiv(rows, M)
    item = (tl.program_id(0) // tiles).to(tl.int64)
    row = tl.program_id(0) % tiles * M + tl.arange(0, M)
    begin = tl.program_id(1) * each
    bundle = tl.load(place + item % bundles * C + tl.arange(0, C))
    q = load_halves(queries + item * rows * C, row, rows, C, 0)
    q_low = q
    if TERMS == 2:
        q_low = load_halves(queries + (tl.num_programs(0) // tiles + item) * rows * C, row, rows, C, 0)
    slope = tl.load(slopes + item * rows + row, mask=row < rows, other=0.0)
    raised = tl.load(added + item * rows + row, mask=row < rows, other=0.0)
    base = words + item // bundles * batch_stride + begin.to(tl.int64) * stride
    out += (item * rows + row)[None, :] * blocks * _BLOCK + begin * _BLOCK + tl.arange(0, _BLOCK)[:, None]
    for _ in range(begin, tl.minimum(begin + each, blocks)):
        u = integers(load_words(base, bundle, 1, stride, 1), bundle, True)
        x = add_products(u, q, q_low, tl.zeros((_BLOCK, M), tl.float32), TERMS, 0)
        tl.store(out, x * slope[None, :] + raised[None, :], mask=(row < rows)[None, :])
        base += stride
        out += _BLOCK


@triton.jit
def _sums(
    words, place, weights, largest, out, bundles, rows, most, batch_stride, stride, blocks, each,
    M: tl.constexpr, C: tl.constexpr, TERMS: tl.constexpr,
):  # fmt: skip
    """Store sums `out` [splits, items, rows, most] of `weights` [items, rows, tokens]: one item, M rows, `each` blocks."""
    tiles = tl.cdiv(rows, M)
    item = (tl.program_id(0) // tiles).to(tl.int64)
    row = tl.program_id(0) % tiles * M + tl.arange(0, M)
    begin = tl.program_id(1) * each
    c = tl.arange(0, C)
    bundle = tl.load(place + item % bundles * C + c)
    power, inverse = power_below(tl.load(largest + item * rows + row, mask=row < rows, other=0.0))
    base = words + item // bundles * batch_stride + begin.to(tl.int64) * stride
    weights += (item * rows + row)[None, :] * blocks * _BLOCK + begin * _BLOCK + tl.arange(0, _BLOCK)[:, None]
    acc = tl.zeros((C, M), tl.float32)
    for _ in range(begin, tl.minimum(begin + each, blocks)):
        a = tl.load(weights, mask=(row < rows)[None, :], other=0.0).to(tl.float32)
        high, low, _ = halves(a * inverse[None, :])
        u = integers(load_words(base, bundle, 1, stride, 1), bundle, True)
        acc = accumulate(u, high, low, acc, TERMS, 0)
        base += stride
        weights += _BLOCK
    position = (tl.program_id(1) * (tl.num_programs(0) // tiles) + item) * rows + row
    tl.store(
        out + position[None, :] * most + c[:, None],
        acc * (power * UNIT)[None, :],
        mask=(c < most)[:, None] & (row < rows)[None, :],
    )
