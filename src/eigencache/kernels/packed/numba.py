"""Logits and weighted sums of `reference.py` compiled by numba for CPUs: a byte is unpacked once for all rows of a bundle.

A byte becomes floats without a mask: the high half of f = l + 16 h is h = ⌊f/16⌋, and q_l l + q_h h =
q_l f + (q_h − 16 q_l) h. The numbers f and h are *planes*: the kernels multiply planes, eight planes of 64 tokens at a time.
One small matrix, from `planes`, converts queries from coefficients to planes and weighted sums from planes to coefficients.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial

import numba
import numpy as np
import torch
from torch import Tensor

from eigencache.kernels.packed.format import BLOCK, Widths, bundle_layout, most_coefficients
from eigencache.modes import constant

_PLANES = 8  # planes of 64 tokens in one pass
_TILE = 8  # blocks whose planes are unpacked at a time
_compiled = numba.njit(
    cache=True, nogil=True, boundscheck=False, fastmath={"contract", "reassoc", "nsz"}, error_model="numpy"
)
_F = np.float32
# In the kernels, `codes` are [batch, blocks, bytes], `counts` are of `bundle_layout`, and an item is a bundle of a sequence.


def logits(packed: Tensor, widths: tuple[Widths, ...], queries: Tensor) -> Tensor:
    """Return the result of `reference.logits` for queries in planes."""
    q = queries.float().contiguous()
    out = torch.empty(*q.shape[:3], packed.shape[1] * BLOCK)
    arrays = [x.numpy() for x in (packed.contiguous(), bundle_layout(widths), q.flatten(0, 1), out.flatten(0, 1))]
    _run_on_threads(partial(_logits, *arrays), len(arrays[2]))
    return out


def sums(packed: Tensor, widths: tuple[Widths, ...], weights: Tensor) -> Tensor:
    """Return the result of `reference.sums` in planes."""
    w = weights.float().contiguous()
    out = torch.zeros(*w.shape[:3], most_coefficients(widths))
    arrays = [x.numpy() for x in (packed.contiguous(), bundle_layout(widths), w.flatten(0, 1), out.flatten(0, 1))]
    _run_on_threads(partial(_sums, *arrays), len(arrays[2]))
    return out


@cache
@constant
def planes(widths: tuple[Widths, ...]) -> Tensor:
    """Return A [bundles, most, most] with coefficients = A planes, planes in the order in which the kernels make them."""
    matrices = torch.zeros(len(widths), *[most_coefficients(widths)] * 2)
    for matrix, w in zip(matrices, widths, strict=True):
        start = 0
        for count, bits in ((w.eight, 8), (w.four, 4), (w.two, 2)):
            per_byte = 8 // bits
            rows = _PLANES // per_byte  # bytes of a token in a pass
            for i in range(count):
                byte, part = i % (count // per_byte), i // (count // per_byte)
                plane = start + byte // rows * _PLANES + byte % rows
                matrix[start + i, plane + part * rows] = 1
                if part + 1 < per_byte:
                    matrix[start + i, plane + (part + 1) * rows] = -(2**bits)
            start += count
    return matrices


def _run_on_threads(work: Callable[[int, int], None], items: int) -> None:
    """Call `work(first, stop)` on as many threads as torch uses; compiled code releases the GIL."""
    threads = min(torch.get_num_threads(), items)
    if threads == 1:
        return work(0, items)
    edges = [items * i // threads for i in range(threads + 1)]
    list(_pool(threads).map(work, edges, edges[1:]))
    return None


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads)


@_compiled
def _unpack(row, bits, x, stride, start):
    """Write eight planes of 64 tokens to x[start + i stride :]; return how many bytes of `row` hold them."""
    per_byte = 8 // bits
    rows = _PLANES // per_byte
    for k in range(rows):
        source, plane = row[BLOCK * k : BLOCK * k + BLOCK], x[k * stride + start : k * stride + start + BLOCK]
        for t in range(BLOCK):
            plane[t] = _F(source[t])
        for part in range(1, per_byte):
            target = x[(k + part * rows) * stride + start : (k + part * rows) * stride + start + BLOCK]
            scale = _F(1.0 / (1 << (bits * part)))
            for t in range(BLOCK):
                target[t] = np.floor(plane[t] * scale)
    return rows * BLOCK


@_compiled
def _logits(codes, counts, queries, out, first, stop):
    """Fill `out` [items, rows, tokens] for items first … stop of `queries` [items, rows, planes]."""
    rows = queries.shape[1]
    x = np.empty(_PLANES * BLOCK, np.float32)
    sums = np.empty((rows, BLOCK), np.float32)
    for item in range(first, stop):
        q, o = queries[item], out[item]
        batch, bundle = divmod(item, len(counts))
        begin, eight, four, planes = counts[bundle]
        for block in range(codes.shape[1]):
            row = codes[batch, block, begin:]
            sums[:] = 0
            for p in range(0, planes, _PLANES):
                row = row[_unpack(row, 8 if p < eight else 4 if p < four else 2, x, BLOCK, 0) :]
                for r in range(rows):
                    a, b, c, d = q[r, p], q[r, p + 1], q[r, p + 2], q[r, p + 3]
                    e, f, g, h = q[r, p + 4], q[r, p + 5], q[r, p + 6], q[r, p + 7]
                    for t in range(BLOCK):
                        sums[r, t] += (a * x[t] + b * x[64 + t] + c * x[128 + t] + d * x[192 + t]) + (
                            e * x[256 + t] + f * x[320 + t] + g * x[384 + t] + h * x[448 + t]
                        )
            for r in range(rows):
                for t in range(BLOCK):
                    o[r, block * BLOCK + t] = sums[r, t]


@_compiled
def _dot(a, b):
    total = _F(0)
    for t in range(len(a)):
        total += a[t] * b[t]
    return total


@_compiled
def _sums(codes, counts, weights, out, first, stop):
    """Add to `out` [items, rows, planes] for items first … stop of `weights` [items, rows, tokens]."""
    blocks = codes.shape[1]
    x = np.empty(_PLANES * _TILE * BLOCK, np.float32)
    for item in range(first, stop):
        batch, bundle = divmod(item, len(counts))
        begin, eight, four, planes = counts[bundle]
        for start in range(0, blocks, _TILE):
            tile = min(_TILE, blocks - start)
            tokens, byte = tile * BLOCK, begin
            for p in range(0, planes, _PLANES):
                bits = 8 if p < eight else 4 if p < four else 2
                used = 0
                for block in range(tile):
                    used = _unpack(codes[batch, start + block, byte:], bits, x, tokens, block * BLOCK)
                byte += used
                for k in range(_PLANES):
                    plane = x[k * tokens : k * tokens + tokens]
                    for r in range(weights.shape[1]):
                        w = weights[item, r, start * BLOCK : start * BLOCK + tokens]
                        out[item, r, p + k] += _dot(w, plane)
