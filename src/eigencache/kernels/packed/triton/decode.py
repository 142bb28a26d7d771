"""Attention of few queries over packed blocks: `attend_kernel` with the tiles of `register_tiles.py`."""

# Triton specializes arguments, so the checker sees the wrong types here.
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false, reportIndexIssue=false
# pyright: reportAttributeAccessIssue=false, reportOptionalOperand=false, reportPossiblyUnboundVariable=false
# pyright: reportGeneralTypeIssues=false

import triton
import triton.language as tl

from eigencache.kernels.packed.format import BLOCK
from eigencache.kernels.packed.triton.register_tiles import (
    gather_queries,
    in_words,
    key_tile,
    load_rows,
    pair_tokens,
    value_tile,
)
from eigencache.kernels.packed.triton.softmax import (
    LOG2E,
    finish_logits,
    load_rotated_mean,
    load_visible,
    locate_piece,
    locate_program,
    softmax_step,
    store_softmax,
)

_BLOCK = tl.constexpr(BLOCK)


@triton.jit
def _dot_terms(a, high, low, x, TERMS: tl.constexpr):
    """Return x + a (high + low), or x + a high where TERMS is 1."""
    x = tl.dot(a, high, x)
    if TERMS == 2:
        x = tl.dot(a, low, x)
    return x


@triton.jit
def _store_sums(sums, acc, rest, inverse, value_rows, unit, position, row, rows, most, VW: tl.constexpr, VN: tl.constexpr):
    """Store the weighted sums of all coefficients, which `value_tile` keeps in parts, and zeros beyond the last one."""
    inverse = inverse[None, :]
    out = sums + position[None, :] * most
    eight, four, two = (
        tl.load(value_rows + 5 * unit + 2),
        tl.load(value_rows + 5 * unit + 3),
        tl.load(value_rows + 5 * unit + 4),
    )
    M: tl.constexpr = acc.shape[1]
    a, b = tl.split(tl.permute(tl.reshape(acc, (2, VW, M)), (1, 2, 0)))
    c = tl.arange(0, VW)
    of_eight = (c < eight)[:, None]
    live = (c < eight + four // 2)[:, None] & (row < rows)[None, :]
    tl.store(out + c[:, None], tl.where(of_eight, a + 16 * b, a) * inverse, mask=live)
    tl.store(out + (c + four // 2)[:, None], b * inverse, mask=live & (c >= eight)[:, None])
    if VN > 0:
        c = tl.arange(0, 4 * VN)
        part, inner = c // VN, c % VN
        live = (inner < two // 4)[:, None] & (row < rows)[None, :]
        tl.store(out + (eight + four + part * (two // 4) + inner)[:, None], rest * inverse, mask=live)
    for start in range(eight + four + two, most, 16):
        padding = start + tl.arange(0, 16)
        kept = (padding < most)[:, None] & (row < rows)[None, :]
        tl.store(out + padding[:, None], tl.zeros((16, M), tl.float32), mask=kept)


@triton.jit
def decode_kernel(
    keys,  # this and all parameters without a comment: as of `attend_kernel`
    others,
    pieces,
    ranges,
    key_rows,  # [units, 5]: `TileRows.bundles` of keys
    key_nibbles,  # [units, 2 · KW]: `TileRows.nibbles` of keys
    key_crumbs,  # [units, 4 · KN]: `TileRows.crumbs` of keys
    value_rows,  # [units, 5]: `TileRows.bundles` of values
    queries,
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
    KW: tl.constexpr,  # rows of 8 and 4 bits in a tile of keys
    KN: tl.constexpr,  # rows of 2 bits in a tile of keys
    VW: tl.constexpr,  # rows of 8 and 4 bits in a tile of values
    VN: tl.constexpr,  # rows of 2 bits in a tile of values
    P: tl.constexpr,
    TERMS: tl.constexpr,
    CAPPED: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """Store weighted sums, largest logits (base 2) and sums of weights of one split, for M rows of one item."""
    T: tl.constexpr = BLOCKS * _BLOCK
    items, item, batch, unit, split, row = locate_program(rows, units, M)
    key_wide, key_narrow = tl.load(key_rows + 5 * unit), tl.load(key_rows + 5 * unit + 1)
    value_wide, value_narrow = tl.load(value_rows + 5 * unit), tl.load(value_rows + 5 * unit + 1)

    upper = queries + item * rows * C
    lower = queries + (items + item) * rows * C
    q = gather_queries(upper, key_nibbles + unit * 2 * KW, row, rows, C, 2 * KW)
    q_low = q
    if TERMS == 2:
        q_low = gather_queries(lower, key_nibbles + unit * 2 * KW, row, rows, C, 2 * KW)
    if KN > 0:
        r = gather_queries(upper, key_crumbs + unit * 4 * KN, row, rows, C, 4 * KN)
        r_low = r
        if TERMS == 2:
            r_low = gather_queries(lower, key_crumbs + unit * 4 * KN, row, rows, C, 4 * KN)
    slope = tl.load(slopes + item * rows + row, mask=row < rows, other=1.0) * LOG2E
    raised = tl.load(added + item * rows + row, mask=row < rows, other=0.0) * LOG2E
    token = pair_tokens(T)
    mean = None
    if even is not None:
        mean = load_rotated_mean(even, odd, table, item, row, rows, pairs, token, P, 0)
    begin, end, least, last = load_visible(first, stop, item, row, rows, all_blocks)

    acc = tl.zeros((2 * VW, M), tl.float32)
    rest = acc
    if VN > 0:
        rest = tl.zeros((4 * VN, M), tl.float32)
    total = tl.zeros((T, M), tl.float32)  # added up once at the end
    top = tl.full((M,), float("-inf"), tl.float32)
    scale = slope  # from x and `top` to logits
    if (even is not None) | CAPPED:
        scale = tl.full((M,), 1.0, tl.float32)

    for piece in range(tl.load(ranges + split), tl.load(ranges + split + 1)):
        k, v, before, low, high = locate_piece(pieces, piece, keys, others, batch, key_stride, other_stride, least, last)
        for block in range(low, high, BLOCKS):
            left = high - block
            k_wide = load_rows(k, key_wide, left, key_stride, KW, BLOCKS)
            v_wide = load_rows(v, value_wide, left, other_stride, VW, BLOCKS)
            if KN > 0:
                k_narrow = load_rows(k, key_narrow, left, key_stride, KN, BLOCKS)
            if VN > 0:
                v_narrow = load_rows(v, value_narrow, left, other_stride, VN, BLOCKS)
            x = _dot_terms(key_tile(k_wide, 4), q, q_low, tl.zeros((T, M), tl.float32), TERMS)
            if KN > 0:
                x = _dot_terms(key_tile(k_narrow, 2), r, r_low, x, TERMS)
            angle = (batch * all_blocks + before + block) * pairs
            x = finish_logits(
                x, slope, raised, cap, mean, cos, sin, angle, pairs, begin, end, token, before + block, left,
                CAPPED, first is not None, BLOCKS, 0,
            )  # fmt: skip
            a_high, a_low, a, shrink, top = softmax_step(x, top, scale, first is not None, TERMS, 0)
            total = total * shrink[None, :] + a
            a_high = in_words(a_high)
            if TERMS == 2:
                a_low = in_words(a_low)
            acc = _dot_terms(value_tile(v_wide, 4), a_high, a_low, acc * shrink[None, :], TERMS)
            if VN > 0:
                rest = _dot_terms(value_tile(v_narrow, 2), a_high, a_low, rest * shrink[None, :], TERMS)
            k += BLOCKS * key_stride
            v += BLOCKS * other_stride

    top = top * scale
    if not CAPPED:
        top += raised
    position = (split * items + item) * rows + row
    inverse = store_softmax(tops, totals, position, tl.sum(total, 0), top, row, rows)
    _store_sums(sums, acc, rest, inverse, value_rows, unit, position, row, rows, most, VW, VN)
