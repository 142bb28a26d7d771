"""The kernels of attention inside packed blocks: one query or a chunk of a prompt, all chunks of a layer in one launch.

One program serves some queries of a bundle (a KV head) over a stretch of blocks, as flash decoding does. Tiles of a few
queries are tokens by queries, so that none of a tensor core's rows is idle; integers are unpacked in registers once for keys
and once for values. Weights are halves up to 2^15, and their sum is that of the halves. A second kernel merges stretches by
log-sum-exp; what it gives merges alike with a window and with sinks.
"""
# What a kernel is called with is not what its parameters are inside of it.
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false, reportIndexIssue=false
# pyright: reportAttributeAccessIssue=false, reportOptionalOperand=false, reportPossiblyUnboundVariable=false

import triton
import triton.language as tl

from eigencache.kernels.packed.format import BLOCK
from eigencache.kernels.packed.triton.tiles import (
    UNIT,
    halves,
    integers,
    load_halves,
    load_words,
    power_below,
    products,
    spread,
    tokens_of,
    weighed,
)

_BLOCK = tl.constexpr(BLOCK)
_LIFT = tl.constexpr(15.0)  # weights are up to 2^15: small ones stay exact in half precision
_LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def capped(x, cap):
    """cap · tanh(x / cap)."""
    return cap - 2 * cap / (tl.exp2(x / cap * (2 * _LOG2E)) + 1)


@triton.jit
def _load_angles(table, pairs, token, P: tl.constexpr, AXIS: tl.constexpr):
    """cos or sin of a block's tokens [tokens, pairs], or [pairs, tokens] where AXIS is 1, as two halves."""
    p = tl.arange(0, P)
    at = tl.expand_dims(p * _BLOCK, AXIS) + tl.expand_dims(token, 1 - AXIS)
    high, low, _ = halves(tl.load(table + at, mask=tl.expand_dims(p < pairs, AXIS), other=0.0))
    return high, low


@triton.jit
def load_turning(even, odd, table, item, row, rows, pairs, token, P: tl.constexpr, AXIS: tl.constexpr):
    """Factors of a mean that turns [pairs, rows] between powers of two, these, and angles within a block."""
    p = tl.arange(0, P)
    at = tl.expand_dims((item * rows + row) * pairs, AXIS) + tl.expand_dims(p, 1 - AXIS)
    on = tl.expand_dims(row < rows, AXIS) & tl.expand_dims(p < pairs, 1 - AXIS)
    e, o = tl.load(even + at, mask=on, other=0.0), tl.load(odd + at, mask=on, other=0.0)
    power, inverse = power_below(tl.max(tl.abs(e) + tl.abs(o), AXIS))
    table_cos, low_cos = _load_angles(table, pairs, token, P, AXIS)
    table_sin, low_sin = _load_angles(table + pairs * _BLOCK, pairs, token, P, AXIS)
    return e * spread(inverse, AXIS), o * spread(inverse, AXIS), power, table_cos, low_cos, table_sin, low_sin


@triton.jit
def _both(a, a_low, b, b_low, x):
    """x + (a + a_low) (b + b_low) without the smallest product."""
    x = tl.dot(a_low, b, x)
    x = tl.dot(a, b_low, x)
    return tl.dot(a, b, x)


@triton.jit
def with_turning(
    x, even, odd, power, cos, sin, pairs, table_cos, low_cos, table_sin, low_sin, AXIS: tl.constexpr
):  # fmt: skip
    """x and logits (base 2) of a mean that turns, of one block, from the angles of its first token."""
    p = tl.arange(0, even.shape[AXIS])
    c = tl.expand_dims(tl.load(cos + p, mask=p < pairs, other=0.0), 1 - AXIS)
    s = tl.expand_dims(tl.load(sin + p, mask=p < pairs, other=0.0), 1 - AXIS)
    high, low, _ = halves(even * c + odd * s)
    second, second_low, _ = halves(odd * c - even * s)
    y = tl.zeros(x.shape, tl.float32)
    if AXIS == 0:
        y = _both(table_cos, low_cos, high, low, y)
        y = _both(table_sin, low_sin, second, second_low, y)
    else:
        y = _both(high, low, table_cos, low_cos, y)
        y = _both(second, second_low, table_sin, low_sin, y)
    return x + y * spread(power * _LOG2E, AXIS)


@triton.jit
def softmax_step(x, top, scale, RANGED: tl.constexpr, TERMS: tl.constexpr, AXIS: tl.constexpr):
    """Weights up to 2^15 as halves and as what these add up to, what earlier ones shrink to, and the new largest logit."""
    higher = tl.maximum(top, tl.max(x, AXIS))
    safe = higher
    if RANGED:
        safe = tl.where(higher == float("-inf"), 0.0, higher)
    a = tl.exp2(x * spread(scale, AXIS) - spread(safe * scale - _LIFT, AXIS))
    high, low, _ = halves(a)
    a = high.to(tl.float32)
    if TERMS == 2:
        a += low.to(tl.float32)
    return high, low, a, tl.exp2((top - safe) * scale), higher


@triton.jit
def finish(whole, top, LAST: tl.constexpr):
    """Sum of weights, the largest logit (base 2) or, of the LAST part, the logarithm of all, and what sums are times."""
    inverse = tl.full(whole.shape, 1.0, tl.float32)
    if LAST:
        some = tl.where(whole > 0, whole, 1.0)
        inverse = 1.0 / some
        top = tl.where(whole > 0, (top + (tl.log2(some) - _LIFT)) / _LOG2E, float("-inf"))
    return whole, top, inverse


@triton.jit
def attend_kernel(
    keys,  # words of the first chunk; others' are found from it
    others,  # of values, or of rotary keys beside latents
    pieces,  # [pieces, 6] int64: both offsets and both strides of a sequence in 4 words, blocks, first of all blocks
    ranges,  # [splits + 1] int32: the pieces of every split
    key_places,
    other_places,
    queries,  # halves [terms, items, rows, C]
    rotary,  # halves [terms, items, rows, V] of rotary keys, or None: then `others` are values
    slopes,  # [items, rows]
    added,  # [items, rows]
    first,  # [items, rows] or None, as are the following
    stop,
    even,  # [items, rows, pairs]
    odd,
    cos,  # [batch, blocks, pairs]
    sin,
    table,  # [2 · pairs, 64]
    sums,  # [splits, items, rows, most of what is summed]
    tops,  # [splits, items, rows]
    totals,  # [splits, items, rows], or None: one split, whose `sums` and `tops` are what is asked for
    units,
    rows,
    most,
    key_stride,
    other_stride,
    all_blocks,
    pairs,
    cap,
    M: tl.constexpr,
    C: tl.constexpr,
    V: tl.constexpr,
    P: tl.constexpr,
    TERMS: tl.constexpr,
    AXIS: tl.constexpr,
    CAPPED: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """Sums, largest logits (base 2) and sums of weights of one split, one item (sequence and bundle) and M rows."""
    T: tl.constexpr = BLOCKS * _BLOCK
    tiles = tl.cdiv(rows, M)
    items = tl.num_programs(0) // tiles
    item = (tl.program_id(0) // tiles).to(tl.int64)
    split = tl.program_id(1)
    row = tl.program_id(0) % tiles * M + tl.arange(0, M)
    batch, unit = item // units, item % units
    key_place = tl.load(key_places + unit * C + tl.arange(0, C))
    other_place = tl.load(other_places + unit * V + tl.arange(0, V))

    q = load_halves(queries + item * rows * C, row, rows, C, AXIS)
    q_low = q
    if TERMS == 2:
        q_low = load_halves(queries + (items + item) * rows * C, row, rows, C, AXIS)
    if rotary is not None:
        r = load_halves(rotary + item * rows * V, row, rows, V, AXIS)
        r_low = r
        if TERMS == 2:
            r_low = load_halves(rotary + (items + item) * rows * V, row, rows, V, AXIS)
    slope = tl.load(slopes + item * rows + row, mask=row < rows, other=1.0) * _LOG2E
    if CAPPED:
        raised = tl.load(added + item * rows + row, mask=row < rows, other=0.0) * _LOG2E
    if even is not None:
        e, o, power, table_cos, low_cos, table_sin, low_sin = load_turning(
            even, odd, table, item, row, rows, pairs, tokens_of(T, False), P, AXIS
        )
    least, last = 0, all_blocks
    if first is not None:
        begin = tl.load(first + item * rows + row, mask=row < rows, other=2**30)
        end = tl.load(stop + item * rows + row, mask=row < rows, other=0)
        least, last = tl.maximum(tl.min(begin, 0), 0) // _BLOCK, tl.cdiv(tl.max(end, 0), _BLOCK)

    S: tl.constexpr = V if rotary is None else C
    if AXIS == 0:
        acc = tl.zeros((S, M), tl.float32)
        empty = tl.zeros((T, M), tl.float32)
        total = tl.zeros((T, M), tl.float32)  # added up once at the end
    else:
        acc = tl.zeros((M, S), tl.float32)
        empty = tl.zeros((M, T), tl.float32)
        total = tl.zeros((M,), tl.float32)
    top = tl.full((M,), float("-inf"), tl.float32)
    scale = slope  # of what a dot gives, to logits of base 2
    if (even is not None) | CAPPED:
        scale = tl.full((M,), 1.0, tl.float32)

    for piece in range(tl.load(ranges + split), tl.load(ranges + split + 1)):
        whose = pieces + piece * 6
        before = tl.load(whose + 5).to(tl.int32)
        low = tl.maximum(least - before, 0)
        high = tl.minimum(last - before, tl.load(whose + 4).to(tl.int32))
        k = keys + (tl.load(whose) + batch * tl.load(whose + 2)) * 4 + low.to(tl.int64) * key_stride
        v = others + (tl.load(whose + 1) + batch * tl.load(whose + 3)) * 4 + low.to(tl.int64) * other_stride
        for block in range(low, high, BLOCKS):
            words = load_words(k, key_place, high - block, key_stride, BLOCKS)
            other_words = load_words(v, other_place, high - block, other_stride, BLOCKS)
            u = integers(words, key_place, False)
            x = products(u, q, q_low, empty, TERMS, AXIS)
            w = integers(other_words, other_place, False)
            if rotary is not None:
                x = products(w, r, r_low, x, TERMS, AXIS)
            if (even is not None) | CAPPED:
                x = x * spread(slope, AXIS)
                if even is not None:
                    angle = (batch * all_blocks + before + block) * pairs
                    x = with_turning(
                        x, e, o, power, cos + angle, sin + angle, pairs, table_cos, low_cos, table_sin, low_sin, AXIS
                    )
                if CAPPED:
                    x = capped(x + spread(raised, AXIS), cap * _LOG2E)
            if (first is not None) | (BLOCKS > 1):
                token = tokens_of(T, False)
                on = spread(token < (high - block) * _BLOCK, 1 - AXIS)
                if first is not None:
                    token = spread(token + (before + block) * _BLOCK, 1 - AXIS)
                    on = on & (token >= spread(begin, AXIS)) & (token < spread(end, AXIS))
                x = tl.where(on, x, float("-inf"))
            a_high, a_low, a, less, top = softmax_step(x, top, scale, first is not None, TERMS, AXIS)
            if AXIS == 0:
                total = total * spread(less, AXIS) + a
            if AXIS == 1:
                total = total * less + tl.sum(a, AXIS)
            if rotary is not None:
                w = u
            acc = weighed(w, a_high, a_low, acc * spread(less, AXIS), TERMS, AXIS)
            k += BLOCKS * key_stride
            v += BLOCKS * other_stride

    whole = total
    if AXIS == 0:
        whole = tl.sum(total, 0)
    top = top * scale
    if not CAPPED:
        top += tl.load(added + item * rows + row, mask=row < rows, other=0.0) * _LOG2E
    whole, top, inverse = finish(whole, top, totals is None)
    acc = acc * spread(inverse * UNIT, AXIS)
    at = (split * items + item) * rows + row
    c = tl.arange(0, S)
    tl.store(
        sums + (spread(at * most, AXIS) + spread(c, 1 - AXIS)),
        acc,
        mask=spread(row < rows, AXIS) & spread(c < most, 1 - AXIS),
    )
    tl.store(tops + at, top, mask=row < rows)
    if totals is not None:
        tl.store(totals + at, whole, mask=row < rows)


@triton.jit
def merge_kernel(parts, tops, totals, sums, lse, splits, most, V: tl.constexpr, S: tl.constexpr):
    """One row of all splits: sums over what the weights sum up to, and the logarithm of that."""
    row = tl.program_id(0).to(tl.int64)
    rows = tl.num_programs(0)
    s, v = tl.arange(0, S), tl.arange(0, V)
    top = tl.load(tops + s * rows + row, mask=s < splits, other=float("-inf"))
    best = tl.max(top, 0)
    best = tl.where(best == float("-inf"), 0.0, best)
    whole = tl.sum(tl.exp2(top - best) * tl.load(totals + s * rows + row, mask=s < splits, other=0.0), 0)
    acc = tl.zeros((V,), tl.float32)
    for split in range(splits):
        share = tl.exp2(tl.load(tops + split * rows + row) - best)
        acc += share * tl.load(parts + (split * rows + row) * most + v, mask=v < most, other=0.0)
    some = tl.where(whole > 0, whole, 1.0)
    tl.store(sums + row * most + v, acc / some, mask=v < most)
    tl.store(lse + row, tl.where(whole > 0, (best + (tl.log2(some) - _LIFT)) / _LOG2E, float("-inf")))
