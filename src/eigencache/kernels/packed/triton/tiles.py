"""How Triton reads packed blocks: a tile [coefficients, tokens] in float16, without arithmetic on integers.

A byte row of 64 tokens is 16 words of four tokens. A *place* says in which row and from which bit on a coefficient lies.
Two tokens of a word, t and t + 2, are shifted and masked at once, each into its half of the word. Read as float16, an
integer u ≤ 255 is the subnormal number u · 2^−24, which tensor cores multiply exactly. The other factors are scaled by
powers of two and rounded to float16, or to the sum of two float16 numbers; the sums in float32 are scaled back.
"""

# Triton specializes arguments, so the checker sees the wrong types here.
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false, reportIndexIssue=false
# pyright: reportAttributeAccessIssue=false

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from eigencache.kernels.packed.format import BLOCK, Widths
from eigencache.modes import constant

_WORD = tl.constexpr(4)  # tokens of a word
_WORDS = tl.constexpr(BLOCK // 4)  # words of a byte row
UNIT = tl.constexpr(2.0**24)  # 1 over the float16 number as which the integer 1 is read


def padded(count: int, least: int = 16) -> int:
    """Return the next power of two, at least `least`: the side of a tile."""
    return max(least, triton.next_power_of_2(count))


@lru_cache(maxsize=1024)
@constant
def places(widths: tuple[Widths, ...], repeats: int, device: torch.device) -> Tensor:
    """Return where every coefficient lies: row << 8 | bits << 4 | first bit, int32 [bundles · repeats, padded coefficients].

    Every bundle is repeated `repeats` times. Places beyond the last coefficient have no bits.
    """
    size, table, begin = padded(max((w.coefficients for w in widths), default=0)), [], 0
    for w in widths:
        bundle, row = [0] * size, begin
        first = 0
        for count, bits in ((w.eight, 8), (w.four, 4), (w.two, 2)):
            rows = count * bits // 8
            for i in range(count):
                bundle[first + i] = (row + i % rows) << 8 | bits << 4 | i // rows * bits
            first, row = first + count, row + rows
        table += [bundle] * repeats
        begin = row
    return torch.tensor(table, dtype=torch.int32, device=device)


def words_of(packed: Tensor) -> Tensor:
    """Return blocks [batch, blocks, bytes] as contiguous words int32 aligned to 16 bytes; empty blocks become zeros."""
    if not packed.shape[2]:
        return packed.new_zeros(packed.shape[0], packed.shape[1], BLOCK // 4, dtype=torch.int32)
    aligned = packed.stride(2) == 1 and packed.stride(1) == packed.shape[2] and packed.stride(0) % 16 == 0
    if not aligned or packed.data_ptr() % 16 or packed.storage_offset() % 4:
        packed = packed.clone(memory_format=torch.contiguous_format)
    return packed.view(torch.int32)


@triton.jit
def load_words(base, place, left, stride, BLOCKS: tl.constexpr):
    """Load words [coefficients, 16 · BLOCKS] of blocks of `stride` words; beyond `left` blocks, the last one again."""
    position = tl.arange(0, _WORDS * BLOCKS)
    inner = position
    if BLOCKS > 1:
        inner = tl.minimum(position // _WORDS, left - 1) * stride + position % _WORDS
    return tl.load(base + (((place >> 8) * _WORDS).to(tl.uint32)[:, None] + inner.to(tl.uint32)[None, :]))


@triton.jit
def integers(words, place, NATURAL: tl.constexpr):
    """Return u · 2^−24 in float16 [coefficients, tokens]; unless NATURAL, tokens of a word are in the order 0, 2, 1, 3."""
    first = (place & 7)[:, None]
    mask = (((1 << ((place >> 4) & 15)) - 1) * 0x10001)[:, None]
    bits = words.to(tl.uint32, bitcast=True)
    even = (bits >> first.to(tl.uint32)) & mask.to(tl.uint32)
    odd = (bits >> (first + 8).to(tl.uint32)) & mask.to(tl.uint32)
    zero, one = even.to(tl.uint16), odd.to(tl.uint16)
    two, three = (even >> 16).to(tl.uint16), (odd >> 16).to(tl.uint16)
    if not NATURAL:
        one, two = two, one
    joined = tl.join(tl.join(zero, two), tl.join(one, three))
    return tl.reshape(joined, (words.shape[0], _WORD * words.shape[1])).to(tl.float16, bitcast=True)


@triton.jit
def tile_tokens(T: tl.constexpr, NATURAL: tl.constexpr):
    """Return the tokens of the columns of `integers`."""
    position = tl.arange(0, T)
    if NATURAL:
        return position
    return (position & -4) | ((position & 1) << 1) | ((position >> 1) & 1)


@triton.jit
def power_below(x):
    """Return the largest power of two up to x ≥ 0, limited to 2^−126 … 2^126, and its inverse, both exact."""
    exponent = tl.minimum(tl.maximum(x.to(tl.int32, bitcast=True) & 0x7F800000, 1 << 23), 253 << 23)
    return exponent.to(tl.float32, bitcast=True), ((254 << 23) - exponent).to(tl.float32, bitcast=True)


@triton.jit
def halves(x):
    """Return the float16 number nearest to x, the one nearest to the rest, and the remaining rest in float32."""
    high = x.to(tl.float16)
    rest = x - high.to(tl.float32)
    low = rest.to(tl.float16)
    return high, low, rest - low.to(tl.float32)


@triton.jit
def spread(x, AXIS: tl.constexpr):
    """Return numbers per row as a tile that broadcasts over tokens: [1, rows], or [rows, 1] where AXIS is 1."""
    return tl.expand_dims(x, AXIS)


@triton.jit
def load_halves(queries, row, rows, C: tl.constexpr, AXIS: tl.constexpr):
    """Load prepared queries [C, rows], or [rows, C] where AXIS is 1."""
    c = tl.arange(0, C)
    offset = tl.expand_dims(row * C, AXIS) + tl.expand_dims(c, 1 - AXIS)
    return tl.load(queries + offset, mask=tl.expand_dims(row < rows, AXIS), other=0.0)


@triton.jit
def add_products(u, high, low, x, TERMS: tl.constexpr, AXIS: tl.constexpr):
    """Return x + integers u times queries, float32 [tokens, rows], or [rows, tokens] where AXIS is 1."""
    if AXIS == 0:
        x = tl.dot(tl.trans(u), high, x)
        if TERMS == 2:
            x = tl.dot(tl.trans(u), low, x)
    else:
        x = tl.dot(high, u, x)
        if TERMS == 2:
            x = tl.dot(low, u, x)
    return x


@triton.jit
def accumulate(u, high, low, acc, TERMS: tl.constexpr, AXIS: tl.constexpr):
    """Return acc + integers u times weights, float32 [coefficients, rows], or [rows, coefficients] where AXIS is 1."""
    if AXIS == 0:
        acc = tl.dot(u, high, acc)
        if TERMS == 2:
            acc = tl.dot(u, low, acc)
    else:
        acc = tl.dot(high, tl.trans(u), acc)
        if TERMS == 2:
            acc = tl.dot(low, tl.trans(u), acc)
    return acc
