"""Queries brought to halves once for all that read them: between powers of two, with what rounding takes from all tokens."""
# What a kernel is called with is not what its parameters are inside of it.
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false, reportIndexIssue=false
# pyright: reportAttributeAccessIssue=false

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from eigencache.kernels.packed.triton.tiles import UNIT, halves, power_below


@dataclass(frozen=True, eq=False)
class Prepared:
    """A logit is `slope` · Σ_i (halves_i · integers read as halves) + `added`.

    `halves` [terms, items, rows, padded coefficients], `others` alike of a second store or None; `slope`, `added`
    [items, rows] float32. An item is a bundle of a sequence.
    """

    halves: Tensor
    others: Tensor | None
    slope: Tensor
    added: Tensor


def prepared(
    queries: Tensor,
    places: Tensor,
    exact: bool,
    others: Tensor | None = None,
    other_places: Tensor | None = None,
    constant: Tensor | None = None,
) -> Prepared:
    """Queries [batch, bundles, rows, most] as one half each, or as two, if `exact`, without a shift of all logits.

    An integer lies around the middle of its range; what a rounded query misses there is added to the constant.
    """
    batch, bundles, rows, most = queries.shape
    terms, items, size = 1 + exact, batch * bundles, places.shape[1]
    found = torch.empty(terms, items, rows, size, dtype=torch.float16, device=queries.device)
    slope, added = torch.empty(2, items, rows, device=queries.device).unbind()
    second, other_size, other_most = None, 16, 0
    if others is not None and other_places is not None:
        other_size, other_most = other_places.shape[1], others.shape[3]
        second = found.new_empty(terms, items, rows, other_size)
    given = [None if x is None else x.contiguous() for x in (queries, others, constant)]
    sizes = rows, bundles, most, other_most
    constants = {"C": size, "V": other_size, "TERMS": terms, "num_warps": 1}
    with torch.cuda.device_of(queries):
        _prepare[(items * rows,)](*given, places, other_places, found, second, slope, added, *sizes, **constants)
    return Prepared(found, second, slope, added)


@triton.jit
def _load(queries, places, row, unit, most, C: tl.constexpr):
    """A row of queries and the bits of its coefficients: nothing beyond the last one."""
    c = tl.arange(0, C)
    bits = (tl.load(places + unit * C + c) >> 4) & 15
    return tl.load(queries + row * most + c, mask=(c < most) & (bits > 0), other=0.0).to(tl.float32), bits


@triton.jit
def _store(x, inverse, bits, out, row, count, C: tl.constexpr, TERMS: tl.constexpr):
    """A row as halves; what the middles of the integers lose."""
    high, low, rest = halves(x * inverse)
    tl.store(out + row * C + tl.arange(0, C), high)
    if TERMS == 2:
        tl.store(out + (count + row) * C + tl.arange(0, C), low)
    else:
        rest += low.to(tl.float32)
    return tl.sum(rest * (((1 << bits) - 1).to(tl.float32) * 0.5), 0)


@triton.jit
def _prepare(
    queries, others, constant, places, other_places, out, other_out, slope, added, rows, bundles, most, other_most,
    C: tl.constexpr, V: tl.constexpr, TERMS: tl.constexpr,
):  # fmt: skip
    """One row of one item."""
    row = tl.program_id(0).to(tl.int64)
    count = tl.num_programs(0)
    unit = row // rows % bundles
    x, bits = _load(queries, places, row, unit, most, C)
    largest = tl.max(tl.abs(x), 0)
    if others is not None:
        y, other_bits = _load(others, other_places, row, unit, other_most, V)
        power, inverse = power_below(tl.maximum(largest, tl.max(tl.abs(y), 0)))
        lost = _store(x, inverse, bits, out, row, count, C, TERMS)
        lost += _store(y, inverse, other_bits, other_out, row, count, V, TERMS)
    else:
        power, inverse = power_below(largest)
        lost = _store(x, inverse, bits, out, row, count, C, TERMS)
    lost *= power
    if constant is not None:
        lost += tl.load(constant + row)
    tl.store(slope + row, power * UNIT)
    tl.store(added + row, lost)
