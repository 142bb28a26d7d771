"""Attention over packed blocks in one kernel: one query or a chunk of a prompt, all chunks of a layer in one launch.

One program serves some queries of a bundle over a split of the blocks, as flash decoding does. Integers are unpacked in
registers, once for keys and once for values. Tiles of few queries are [tokens, queries], so that no row of a tensor core is
idle. `decode.py` has a faster kernel for few queries; `softmax.py` has the steps that both share.
"""

# Triton specializes arguments, so the checker sees the wrong types here.
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false, reportIndexIssue=false
# pyright: reportAttributeAccessIssue=false, reportOptionalOperand=false, reportPossiblyUnboundVariable=false
# pyright: reportGeneralTypeIssues=false

import triton
import triton.language as tl

from eigencache.kernels.packed.format import BLOCK
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
from eigencache.kernels.packed.triton.tiles import (
    accumulate,
    add_products,
    integers,
    load_halves,
    load_words,
    spread,
    tile_tokens,
)

_BLOCK = tl.constexpr(BLOCK)


@triton.jit
def attend_kernel(
    keys,  # words int32 of the first chunk; other chunks are found by their offsets in `pieces`
    others,  # words of values, or of the rotary keys of MLA
    pieces,  # [pieces, 6] int64: two offsets and two sequence strides in units of 4 words, blocks, blocks before
    ranges,  # [splits + 1] int32: the first piece of every split
    key_places,  # [units, C] int32: of `tiles.places`
    other_places,  # [units, V] int32
    queries,  # float16 [terms, items, rows, C]
    rotary,  # float16 [terms, items, rows, V] queries of rotary keys; None: `others` are values
    slopes,  # float32 [items, rows]
    added,  # float32 [items, rows]
    first,  # int32 [items, rows]: first visible token; None: all tokens are visible
    stop,  # int32 [items, rows]: the token after the last visible one, or None
    even,  # float32 [items, rows, pairs], or None, as the following four: no rotated mean
    odd,  # float32 [items, rows, pairs]
    cos,  # float32 [batch, blocks, pairs]
    sin,  # float32 [batch, blocks, pairs]
    table,  # float32 [2 · pairs, 64]
    sums,  # output float32 [splits, items, rows, most]
    tops,  # output float32 [splits, items, rows]
    totals,  # output float32 [splits, items, rows]; None: one split, whose `sums` are normalized and `tops` log-sum-exp
    units,
    rows,
    most,  # coefficients of `sums`
    key_stride,  # words of a block
    other_stride,
    all_blocks,
    pairs,
    cap,
    M: tl.constexpr,  # rows of a program
    C: tl.constexpr,  # padded coefficients of keys
    V: tl.constexpr,  # padded coefficients of `others`
    P: tl.constexpr,  # padded pairs
    TERMS: tl.constexpr,  # float16 numbers per query and weight
    AXIS: tl.constexpr,  # of the tokens in tiles
    CAPPED: tl.constexpr,
    BLOCKS: tl.constexpr,  # blocks of a tile
):
    """Store weighted sums, largest logits (base 2) and sums of weights of one split, for M rows of one item."""
    T: tl.constexpr = BLOCKS * _BLOCK
    items, item, batch, unit, split, row = locate_program(rows, units, M)
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
    slope = tl.load(slopes + item * rows + row, mask=row < rows, other=1.0) * LOG2E
    raised = slope
    if CAPPED:
        raised = tl.load(added + item * rows + row, mask=row < rows, other=0.0) * LOG2E
    mean = None
    if even is not None:
        mean = load_rotated_mean(even, odd, table, item, row, rows, pairs, tile_tokens(T, False), P, AXIS)
    begin, end, least, last = load_visible(first, stop, item, row, rows, all_blocks)

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
    scale = slope  # from x and `top` to logits
    if (even is not None) | CAPPED:
        scale = tl.full((M,), 1.0, tl.float32)

    for piece in range(tl.load(ranges + split), tl.load(ranges + split + 1)):
        k, v, before, low, high = locate_piece(pieces, piece, keys, others, batch, key_stride, other_stride, least, last)
        for block in range(low, high, BLOCKS):
            words = load_words(k, key_place, high - block, key_stride, BLOCKS)
            other_words = load_words(v, other_place, high - block, other_stride, BLOCKS)
            u = integers(words, key_place, False)
            x = add_products(u, q, q_low, empty, TERMS, AXIS)
            w = integers(other_words, other_place, False)
            if rotary is not None:
                x = add_products(w, r, r_low, x, TERMS, AXIS)
            angle = (batch * all_blocks + before + block) * pairs
            x = finish_logits(
                x, slope, raised, cap, mean, cos, sin, angle, pairs, begin, end, tile_tokens(T, False), before + block,
                high - block, CAPPED, first is not None, BLOCKS, AXIS,
            )  # fmt: skip
            a_high, a_low, a, shrink, top = softmax_step(x, top, scale, first is not None, TERMS, AXIS)
            if AXIS == 0:
                total = total * spread(shrink, AXIS) + a
            if AXIS == 1:
                total = total * shrink + tl.sum(a, AXIS)
            if rotary is not None:
                w = u
            acc = accumulate(w, a_high, a_low, acc * spread(shrink, AXIS), TERMS, AXIS)
            k += BLOCKS * key_stride
            v += BLOCKS * other_stride

    if AXIS == 0:
        total = tl.sum(total, 0)
    top = top * scale
    if not CAPPED:
        top += tl.load(added + item * rows + row, mask=row < rows, other=0.0) * LOG2E
    position = (split * items + item) * rows + row
    acc = acc * spread(store_softmax(tops, totals, position, total, top, row, rows), AXIS)
    c = tl.arange(0, S)
    tl.store(
        sums + (spread(position * most, AXIS) + spread(c, 1 - AXIS)),
        acc,
        mask=spread(row < rows, AXIS) & spread(c < most, 1 - AXIS),
    )
