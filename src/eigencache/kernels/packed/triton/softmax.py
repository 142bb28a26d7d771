"""Steps of an online softmax over packed blocks, shared by `attend_kernel` and `decode_kernel`, and the merge of splits.

Logits are in base 2. Softmax weights are float16 numbers up to 2^15, so that small weights keep their precision; the sum of
weights adds up the rounded numbers. A program reads one split of the blocks; `merge_kernel` joins splits by log-sum-exp.
In tiles, AXIS is the axis of the tokens: [tokens, rows] for 0, [rows, tokens] for 1.
"""

# Triton specializes arguments, so the checker sees the wrong types here.
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false, reportIndexIssue=false
# pyright: reportAttributeAccessIssue=false, reportOptionalOperand=false, reportPossiblyUnboundVariable=false
# pyright: reportGeneralTypeIssues=false

import triton
import triton.language as tl

from eigencache.kernels.packed.format import BLOCK
from eigencache.kernels.packed.triton.tiles import UNIT, halves, power_below, spread

_BLOCK = tl.constexpr(BLOCK)
_LIFT = tl.constexpr(15.0)  # weights are up to 2^15
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def locate_program(rows, units, M: tl.constexpr):
    """Return the number of items; this program's item, sequence, unit and split; and its M rows of queries.

    An item is a unit of a sequence; a unit is the heads whose keys share one bundle and whose values share one bundle.
    """
    tiles = tl.cdiv(rows, M)
    items = tl.num_programs(0) // tiles
    item = (tl.program_id(0) // tiles).to(tl.int64)
    row = tl.program_id(0) % tiles * M + tl.arange(0, M)
    return items, item, item // units, item % units, tl.program_id(1), row


@triton.jit
def load_visible(first, stop, item, row, rows, all_blocks):
    """Return the visible tokens of each row, from `begin` up to `end`, and the blocks that hold those of any row.

    Where `first` is None, all blocks are visible and `begin` and `end` have no meaning.
    """
    begin, end, least, last = row, row, 0, all_blocks
    if first is not None:
        begin = tl.load(first + item * rows + row, mask=row < rows, other=2**30)
        end = tl.load(stop + item * rows + row, mask=row < rows, other=0)
        least, last = tl.maximum(tl.min(begin, 0), 0) // _BLOCK, tl.cdiv(tl.max(end, 0), _BLOCK)
    return begin, end, least, last


@triton.jit
def locate_piece(pieces, piece, keys, others, batch, key_stride, other_stride, least, last):
    """Return pointers to the first visible block of a piece, the number of blocks before the piece, and its visible range.

    The range counts blocks from the beginning of the piece. `pieces` and strides: as of `attend_kernel`.
    """
    entry = pieces + piece * 6
    before = tl.load(entry + 5).to(tl.int32)
    low = tl.maximum(least - before, 0)
    high = tl.minimum(last - before, tl.load(entry + 4).to(tl.int32))
    key = keys + (tl.load(entry) + batch * tl.load(entry + 2)) * 4 + low.to(tl.int64) * key_stride
    other = others + (tl.load(entry + 1) + batch * tl.load(entry + 3)) * 4 + low.to(tl.int64) * other_stride
    return key, other, before, low, high


@triton.jit
def _soft_cap(x, cap):
    """Return cap · tanh(x / cap)."""
    return cap - 2 * cap / (tl.exp2(x / cap * (2 * LOG2E)) + 1)


@triton.jit
def _load_angles(table, pairs, token, P: tl.constexpr, AXIS: tl.constexpr):
    """Load cos or sin of a block's tokens [tokens, pairs], or [pairs, tokens] where AXIS is 1, as the sum of two halves."""
    p = tl.arange(0, P)
    offset = tl.expand_dims(p * _BLOCK, AXIS) + tl.expand_dims(token, 1 - AXIS)
    high, low, _ = halves(tl.load(table + offset, mask=tl.expand_dims(p < pairs, AXIS), other=0.0))
    return high, low


@triton.jit
def load_rotated_mean(even, odd, table, item, row, rows, pairs, token, P: tl.constexpr, AXIS: tl.constexpr):
    """Load the factors of a rotated mean.

    These are `even` and `odd` [pairs, rows] divided by a power of two per row, that power, and cos and sin of the angles
    within a block, each as two halves.
    """
    p = tl.arange(0, P)
    offset = tl.expand_dims((item * rows + row) * pairs, AXIS) + tl.expand_dims(p, 1 - AXIS)
    on = tl.expand_dims(row < rows, AXIS) & tl.expand_dims(p < pairs, 1 - AXIS)
    e, o = tl.load(even + offset, mask=on, other=0.0), tl.load(odd + offset, mask=on, other=0.0)
    power, inverse = power_below(tl.max(tl.abs(e) + tl.abs(o), AXIS))
    cos, cos_low = _load_angles(table, pairs, token, P, AXIS)
    sin, sin_low = _load_angles(table + pairs * _BLOCK, pairs, token, P, AXIS)
    return e * spread(inverse, AXIS), o * spread(inverse, AXIS), power, cos, cos_low, sin, sin_low


@triton.jit
def _dot_of_sums(a, a_low, b, b_low, x):
    """Return x + (a + a_low) (b + b_low), without a_low b_low."""
    x = tl.dot(a_low, b, x)
    x = tl.dot(a, b_low, x)
    return tl.dot(a, b, x)


@triton.jit
def _add_rotated_mean(x, mean, cos, sin, angle, pairs, AXIS: tl.constexpr):
    """Add the logits of a rotated mean to one block x; the angles of its first token are at `cos + angle`, `sin + angle`."""
    even, odd, power, table_cos, cos_low, table_sin, sin_low = mean
    p = tl.arange(0, even.shape[AXIS])
    c = tl.expand_dims(tl.load(cos + angle + p, mask=p < pairs, other=0.0), 1 - AXIS)
    s = tl.expand_dims(tl.load(sin + angle + p, mask=p < pairs, other=0.0), 1 - AXIS)
    high, low, _ = halves(even * c + odd * s)
    second, second_low, _ = halves(odd * c - even * s)
    y = tl.zeros(x.shape, tl.float32)
    if AXIS == 0:
        y = _dot_of_sums(table_cos, cos_low, high, low, y)
        y = _dot_of_sums(table_sin, sin_low, second, second_low, y)
    else:
        y = _dot_of_sums(high, low, table_cos, cos_low, y)
        y = _dot_of_sums(second, second_low, table_sin, sin_low, y)
    return x + y * spread(power * LOG2E, AXIS)


@triton.jit
def finish_logits(
    x, slope, raised, cap, mean, cos, sin, angle, pairs, begin, end, token, before, left,
    CAPPED: tl.constexpr, RANGED: tl.constexpr, BLOCKS: tl.constexpr, AXIS: tl.constexpr,
):  # fmt: skip
    """Turn products of integers and queries into logits: add the rotated mean, cap, and hide invisible tokens by −∞.

    Without a mean and a cap, x stays unscaled: `slope` and `raised` are then applied to the largest logit alone. `token`:
    the token of every row or column of the tile, counted from the block that `before` blocks precede and from which on
    `left` blocks remain.
    """
    if (mean is not None) | CAPPED:
        x = x * spread(slope, AXIS)
        if mean is not None:
            x = _add_rotated_mean(x, mean, cos, sin, angle, pairs, AXIS)
        if CAPPED:
            x = _soft_cap(x + spread(raised, AXIS), cap * LOG2E)
    if RANGED | (BLOCKS > 1):
        on = spread(token < left * _BLOCK, 1 - AXIS)
        if RANGED:
            position = spread(token + before * _BLOCK, 1 - AXIS)
            on = on & (position >= spread(begin, AXIS)) & (position < spread(end, AXIS))
        x = tl.where(on, x, float("-inf"))
    return x


@triton.jit
def softmax_step(x, top, scale, RANGED: tl.constexpr, TERMS: tl.constexpr, AXIS: tl.constexpr):
    """Take one tile of logits x · `scale` into an online softmax whose largest logit so far is `top` · `scale`.

    Returns the weights of the tile as two halves, their rounded values in float32, the factor of all earlier weights, and
    the new largest logit.
    """
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
def store_softmax(tops, totals, position, total, top, row, rows):
    """Store the sums of weights and the largest logits of one split; return the factor of its weighted sums.

    Where `totals` is None the split is the only one: `tops` receives the log-sum-exp (base e), and the factor normalizes.
    """
    inverse = tl.full(total.shape, 1.0, tl.float32)
    if totals is None:
        some = tl.where(total > 0, total, 1.0)
        inverse = 1.0 / some
        top = tl.where(total > 0, (top + (tl.log2(some) - _LIFT)) / LOG2E, float("-inf"))
    else:
        tl.store(totals + position, total, mask=row < rows)
    tl.store(tops + position, top, mask=row < rows)
    return inverse * UNIT


@triton.jit
def merge_kernel(parts, tops, totals, sums, lse, splits, most, V: tl.constexpr, S: tl.constexpr):
    """Merge all splits of one row: normalized sums, and the log-sum-exp (base e)."""
    row = tl.program_id(0).to(tl.int64)
    rows = tl.num_programs(0)
    s, v = tl.arange(0, S), tl.arange(0, V)
    top = tl.load(tops + s * rows + row, mask=s < splits, other=float("-inf"))
    best = tl.max(top, 0)
    best = tl.where(best == float("-inf"), 0.0, best)
    total = tl.sum(tl.exp2(top - best) * tl.load(totals + s * rows + row, mask=s < splits, other=0.0), 0)
    acc = tl.zeros((V,), tl.float32)
    for split in range(splits):
        share = tl.exp2(tl.load(tops + split * rows + row) - best)
        acc += share * tl.load(parts + (split * rows + row) * most + v, mask=v < most, other=0.0)
    some = tl.where(total > 0, total, 1.0)
    tl.store(sums + row * most + v, acc / some, mask=v < most)
    tl.store(lse + row, tl.where(total > 0, (best + (tl.log2(some) - _LIFT)) / LOG2E, float("-inf")))
