"""`kernels/reference.py` compiled for CPUs: integers are unpacked once into registers' width, for all rows of a head.

A byte is turned into floats without a mask: of f = l + 16 h the high half is h = ⌊f/16⌋, and q_l l + q_h h =
q_l f + (q_h − 16 q_l) h. What is multiplied are such planes, eight of 64 tokens at a time; queries are brought to planes
before, and sums of planes to coefficients after, by one small matrix.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial

import numba
import numpy as np
import torch
from torch import Tensor

from eigencache.kernels.reference import BLOCK, Widths, largest_integers, most_coefficients

_PLANES = 8  # of 64 tokens, in one pass
_LANES = 16  # partial sums
_compiled = numba.njit(
    cache=True, nogil=True, boundscheck=False, fastmath={"contract", "reassoc", "nsz"}, error_model="numpy"
)
_F = np.float32


def logits(packed: Tensor, widths: tuple[Widths, ...], queries: Tensor) -> Tensor:
    """As `reference.logits`."""
    planes, counts = _planes(widths), _counts(widths)
    q = queries.float()
    found = torch.empty(*q.shape[:3], packed.shape[1] * BLOCK)
    constant = (q * (largest_integers(widths) / 2)[:, None]).sum(-1)
    args = (packed.contiguous(), counts, (q @ planes).flatten(0, 1), constant.flatten(0, 1), found.flatten(0, 1))
    arrays = [x.numpy() for x in args]
    _shared(partial(_logits, *arrays), len(arrays[2]))
    return found


def sums(packed: Tensor, widths: tuple[Widths, ...], weights: Tensor) -> Tensor:
    """As `reference.sums`."""
    w = weights.float().contiguous()
    found = torch.zeros(*w.shape[:3], most_coefficients(widths))
    arrays = [x.numpy() for x in (packed.contiguous(), _counts(widths), w.flatten(0, 1), found.flatten(0, 1))]
    _shared(partial(_sums, *arrays), len(arrays[2]))
    return found @ _planes(widths).mT - w.sum(-1, keepdim=True) * (largest_integers(widths) / 2)[:, None]


@cache
def _counts(widths: tuple[Widths, ...]) -> Tensor:
    """Per bundle [bundles, 4] int64: its first byte in a block, coefficients of 8, of 8 or 4, and of any bits."""
    found, at = [], 0
    for w in widths:
        found.append((at, w.eight, w.eight + w.four, w.coefficients))
        at += w.nbytes
    return torch.tensor(found)


@cache
def _planes(widths: tuple[Widths, ...]) -> Tensor:
    """A [bundles, most, most] with integers = A planes, planes in the order in which passes make them."""
    found = torch.zeros(len(widths), *[most_coefficients(widths)] * 2)
    for own, w in zip(found, widths, strict=True):
        at = 0
        for count, bits in ((w.eight, 8), (w.four, 4), (w.two, 2)):
            each = 8 // bits
            rows = _PLANES // each  # bytes of a token in a pass
            for i in range(count):
                byte, part = i % (count // each), i // (count // each)
                plane = at + byte // rows * _PLANES + byte % rows
                own[at + i, plane + part * rows] = 1
                if part + 1 < each:
                    own[at + i, plane + (part + 1) * rows] = -(2**bits)
            at += count
    return found


def _shared(work: Callable[[int, int], None], items: int) -> None:
    """`work(first, stop)` on as many threads as torch has: compiled code leaves the interpreter's lock."""
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
def _unpack(row, bits, x):
    """Eight planes of 64 tokens [512] from the bytes that hold them, and how many bytes those are."""
    if bits == 8:
        for t in range(512):
            x[t] = _F(row[t])
        return 512
    if bits == 4:
        for t in range(256):
            x[t] = _F(row[t])
        for t in range(256):
            x[256 + t] = np.floor(x[t] * _F(1 / 16))
        return 256
    for t in range(128):
        x[t] = _F(row[t])
    for t in range(128):
        x[128 + t] = np.floor(x[t] * _F(1 / 4))
    for t in range(128):
        x[256 + t] = np.floor(x[t] * _F(1 / 16))
    for t in range(128):
        x[384 + t] = np.floor(x[t] * _F(1 / 64))
    return 128


@_compiled
def _logits(codes, counts, queries, constant, out, first, stop):
    """`codes` [batch, blocks, bytes], `queries` [items, rows, planes], `out` [items, rows, tokens]: items first … stop."""
    rows = queries.shape[1]
    x = np.empty(_PLANES * BLOCK, np.float32)
    sums = np.empty((rows, BLOCK), np.float32)
    for item in range(first, stop):
        q, o = queries[item], out[item]
        batch, bundle = divmod(item, len(counts))
        begin, eight, four, planes = counts[bundle]
        for block in range(codes.shape[1]):
            row = codes[batch, block, begin:]
            for r in range(rows):
                for t in range(BLOCK):
                    sums[r, t] = -constant[item, r]
            for p in range(0, planes, _PLANES):
                row = row[_unpack(row, 8 if p < eight else 4 if p < four else 2, x) :]
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
def _sums(codes, counts, weights, out, first, stop):
    """`codes` [batch, blocks, bytes], `weights` [items, rows, tokens], `out` [items, rows, planes]: items first … stop."""
    rows = weights.shape[1]
    x = np.empty(_PLANES * BLOCK, np.float32)
    w = np.empty((rows, BLOCK), np.float32)
    lanes = np.empty((out.shape[2], rows, _LANES), np.float32)
    for item in range(first, stop):
        batch, bundle = divmod(item, len(counts))
        begin, eight, four, planes = counts[bundle]
        lanes[:] = 0
        for block in range(codes.shape[1]):
            row = codes[batch, block, begin:]
            for r in range(rows):
                for t in range(BLOCK):
                    w[r, t] = weights[item, r, block * BLOCK + t]
            for p in range(0, planes, _PLANES):
                row = row[_unpack(row, 8 if p < eight else 4 if p < four else 2, x) :]
                for k in range(_PLANES):
                    y = x[BLOCK * k : BLOCK * k + BLOCK]
                    for r in range(rows):
                        for i in range(_LANES):
                            lanes[p + k, r, i] += (w[r, i] * y[i] + w[r, 16 + i] * y[16 + i]) + (
                                w[r, 32 + i] * y[32 + i] + w[r, 48 + i] * y[48 + i]
                            )
        for p in range(planes):
            for r in range(rows):
                total = _F(0)
                for i in range(_LANES):
                    total += lanes[p, r, i]
                out[item, r, p] = total
