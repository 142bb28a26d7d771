"""Convert queries to float16 once for all programs that read them.

Every row is scaled to a power of two. The rounding error, multiplied by the middle of every integer's range, is the same for
all tokens and is added back to the logits.
"""

# Triton specializes arguments, so the checker sees the wrong types here.
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false, reportIndexIssue=false
# pyright: reportAttributeAccessIssue=false

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from eigencache.kernels.packed.triton.tiles import UNIT, halves, power_below


@dataclass(frozen=True, eq=False)
class PreparedQueries:
    """Queries as float16: a logit is `slope` · Σ_i (halves_i · u_i read as float16) + `added`.

    An item is a bundle of a sequence.

    Attributes:
        halves: float16 [terms, items, rows, padded coefficients]; the terms of a query add up to it.
        others: the same for the queries of rotary keys, or None.
        slope: float32 [items, rows].
        added: float32 [items, rows].
    """

    halves: Tensor
    others: Tensor | None
    slope: Tensor
    added: Tensor


def prepare_queries(
    queries: Tensor,
    places: Tensor,
    exact: bool,
    others: Tensor | None = None,
    other_places: Tensor | None = None,
    constant: Tensor | None = None,
) -> PreparedQueries:
    """Convert queries to float16.

    Args:
        queries: [batch, bundles, rows, most] queries.
        places: of `tiles.places`, of the coefficients of `queries`.
        exact: True represents a query by the sum of two float16 numbers, False by one.
        others: [batch, bundles, rows, most] queries of rotary keys, or None.
        other_places: places of the coefficients of `others`.
        constant: [batch, bundles, rows] added to all logits of a row, or None.
    """
    batch, bundles, rows, most = queries.shape
    terms, items, size = 1 + exact, batch * bundles, places.shape[1]
    first = torch.empty(terms, items, rows, size, dtype=torch.float16, device=queries.device)
    slope, added = torch.empty(2, items, rows, device=queries.device).unbind()
    second, other_size, other_most = None, 16, 0
    if others is not None and other_places is not None:
        other_size, other_most = other_places.shape[1], others.shape[3]
        second = first.new_empty(terms, items, rows, other_size)
    inputs = [None if x is None else x.contiguous() for x in (queries, others, constant)]
    sizes = rows, bundles, most, other_most
    constants = {"C": size, "V": other_size, "TERMS": terms, "num_warps": 1}
    with torch.cuda.device_of(queries):
        _prepare[(items * rows,)](*inputs, places, other_places, first, second, slope, added, *sizes, **constants)
    return PreparedQueries(first, second, slope, added)


@triton.jit
def _load(queries, places, row, unit, most, C: tl.constexpr):
    """Load a row of queries and the bits of its coefficients; zeros beyond the last coefficient."""
    c = tl.arange(0, C)
    bits = (tl.load(places + unit * C + c) >> 4) & 15
    return tl.load(queries + row * most + c, mask=(c < most) & (bits > 0), other=0.0).to(tl.float32), bits


@triton.jit
def _store(x, inverse, bits, out, row, count, C: tl.constexpr, TERMS: tl.constexpr):
    """Store a row as float16; return the rounding error of the logits at the middle of every integer's range."""
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
    """Convert one row of one item."""
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
