"""Attention of few queries inside packed blocks: `packed_triton_attend.py` with the tiles of `packed_triton_pairs.py`."""
# What a kernel is called with is not what its parameters are inside of it.
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false, reportIndexIssue=false
# pyright: reportAttributeAccessIssue=false, reportOptionalOperand=false, reportPossiblyUnboundVariable=false

import triton
import triton.language as tl

from eigencache.kernels.packed.format import BLOCK
from eigencache.kernels.packed.triton.attend import capped, finish, load_turning, softmax_step, with_turning
from eigencache.kernels.packed.triton.register_tiles import (
    gather_queries,
    in_words,
    key_tile,
    load_rows,
    pair_tokens,
    value_tile,
)
from eigencache.kernels.packed.triton.tiles import UNIT

_BLOCK = tl.constexpr(BLOCK)
_LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _dotted(a, high, low, x, TERMS: tl.constexpr):
    """x + a (high + low)."""
    x = tl.dot(a, high, x)
    if TERMS == 2:
        x = tl.dot(a, low, x)
    return x


@triton.jit
def decode_kernel(
    keys,  # as for `attend_kernel`
    others,
    pieces,
    ranges,
    key_rows,  # [units, 5], as the following of `Rows`
    key_nibbles,  # [units, 2 · KW]
    key_crumbs,  # [units, 4 · KN]
    value_rows,  # [units, 5]
    queries,  # halves [terms, items, rows, C], the following as for `attend_kernel`
    slopes,
    added,
    first,
    stop,
    even,
    odd,
    cos,
    sin,
    table,
    sums,
    tops,
    totals,
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
    KW: tl.constexpr,  # rows of a tile of keys of 8 and 4 bits, and of 2 bits; the same of values
    KN: tl.constexpr,
    VW: tl.constexpr,
    VN: tl.constexpr,
    P: tl.constexpr,
    TERMS: tl.constexpr,
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
    key_wide, key_narrow = tl.load(key_rows + 5 * unit), tl.load(key_rows + 5 * unit + 1)
    value_wide, value_narrow = tl.load(value_rows + 5 * unit), tl.load(value_rows + 5 * unit + 1)

    own = queries + item * rows * C
    lower = queries + (items + item) * rows * C
    q = gather_queries(own, key_nibbles + unit * 2 * KW, row, rows, C, 2 * KW)
    q_low = q
    if TERMS == 2:
        q_low = gather_queries(lower, key_nibbles + unit * 2 * KW, row, rows, C, 2 * KW)
    if KN > 0:
        r = gather_queries(own, key_crumbs + unit * 4 * KN, row, rows, C, 4 * KN)
        r_low = r
        if TERMS == 2:
            r_low = gather_queries(lower, key_crumbs + unit * 4 * KN, row, rows, C, 4 * KN)
    slope = tl.load(slopes + item * rows + row, mask=row < rows, other=1.0) * _LOG2E
    raised = tl.load(added + item * rows + row, mask=row < rows, other=0.0) * _LOG2E
    token = pair_tokens(T)
    if even is not None:
        e, o, power, table_cos, low_cos, table_sin, low_sin = load_turning(
            even, odd, table, item, row, rows, pairs, token, P, 0
        )
    least, last = 0, all_blocks
    if first is not None:
        begin = tl.load(first + item * rows + row, mask=row < rows, other=2**30)
        end = tl.load(stop + item * rows + row, mask=row < rows, other=0)
        least, last = tl.maximum(tl.min(begin, 0), 0) // _BLOCK, tl.cdiv(tl.max(end, 0), _BLOCK)

    acc = tl.zeros((2 * VW, M), tl.float32)
    if VN > 0:
        rest = tl.zeros((4 * VN, M), tl.float32)
    total = tl.zeros((T, M), tl.float32)  # added up once at the end
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
            left = high - block
            k_wide = load_rows(k, key_wide, left, key_stride, KW, BLOCKS)
            v_wide = load_rows(v, value_wide, left, other_stride, VW, BLOCKS)
            if KN > 0:
                k_narrow = load_rows(k, key_narrow, left, key_stride, KN, BLOCKS)
            if VN > 0:
                v_narrow = load_rows(v, value_narrow, left, other_stride, VN, BLOCKS)
            x = _dotted(key_tile(k_wide, 4), q, q_low, tl.zeros((T, M), tl.float32), TERMS)
            if KN > 0:
                x = _dotted(key_tile(k_narrow, 2), r, r_low, x, TERMS)
            if (even is not None) | CAPPED:
                x = x * slope[None, :]
                if even is not None:
                    angle = (batch * all_blocks + before + block) * pairs
                    x = with_turning(
                        x, e, o, power, cos + angle, sin + angle, pairs, table_cos, low_cos, table_sin, low_sin, 0
                    )
                if CAPPED:
                    x = capped(x + raised[None, :], cap * _LOG2E)
            if (first is not None) | (BLOCKS > 1):
                on = (token < left * _BLOCK)[:, None]
                if first is not None:
                    at = (token + (before + block) * _BLOCK)[:, None]
                    on = on & (at >= begin[None, :]) & (at < end[None, :])
                x = tl.where(on, x, float("-inf"))
            a_high, a_low, a, less, top = softmax_step(x, top, scale, first is not None, TERMS, 0)
            total = total * less[None, :] + a
            a_high = in_words(a_high)
            if TERMS == 2:
                a_low = in_words(a_low)
            acc = _dotted(value_tile(v_wide, 4), a_high, a_low, acc * less[None, :], TERMS)
            if VN > 0:
                rest = _dotted(value_tile(v_narrow, 2), a_high, a_low, rest * less[None, :], TERMS)
            k += BLOCKS * key_stride
            v += BLOCKS * other_stride

    top = top * scale
    if not CAPPED:
        top += raised
    whole, top, inverse = finish(tl.sum(total, 0), top, totals is None)
    at = (split * items + item) * rows + row
    tl.store(tops + at, top, mask=row < rows)
    if totals is not None:
        tl.store(totals + at, whole, mask=row < rows)
    inverse = (inverse * UNIT)[None, :]
    out = sums + at[None, :] * most
    eight, four, two = (
        tl.load(value_rows + 5 * unit + 2),
        tl.load(value_rows + 5 * unit + 3),
        tl.load(value_rows + 5 * unit + 4),
    )
    a, b = tl.split(tl.permute(tl.reshape(acc, (2, VW, M)), (1, 2, 0)))
    c = tl.arange(0, VW)
    of_eight = (c < eight)[:, None]
    both = eight + four // 2
    live = (c < both)[:, None] & (row < rows)[None, :]
    tl.store(out + c[:, None], tl.where(of_eight, a + 16 * b, a) * inverse, mask=live)
    tl.store(out + (c + four // 2)[:, None], b * inverse, mask=live & (c >= eight)[:, None])
    if VN > 0:
        c = tl.arange(0, 4 * VN)
        part, inner = c // VN, c % VN
        live = (inner < two // 4)[:, None] & (row < rows)[None, :]
        tl.store(out + (eight + four + part * (two // 4) + inner)[:, None], rest * inverse, mask=live)
    for beyond in range(eight + four + two, most, 16):
        none = beyond + tl.arange(0, 16)
        tl.store(out + none[:, None], tl.zeros((16, M), tl.float32), mask=(none < most)[:, None] & (row < rows)[None, :])
