"""How Triton reads packed blocks: a tile of coefficients by tokens in half precision, without any arithmetic on integers.

A row of 64 bytes is 16 words of four tokens. A coefficient knows its row, and where its bits begin in a byte. Two tokens of
a word are shifted and masked at once, t and t + 2, each into its half of the word; there u ≤ 255 is, bit for bit, the
subnormal half-precision number u · 2^−24, which tensor cores take exactly. What is multiplied with it is brought between
powers of two, as one half or as the sum of two, and the powers are put back into sums of float32.
"""
# What a kernel is called with is not what its parameters are inside of it.
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false, reportIndexIssue=false
# pyright: reportAttributeAccessIssue=false

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from eigencache.kernels.packed.format import BLOCK, Widths
from eigencache.modes import constant

_WORD = tl.constexpr(4)  # tokens
_WORDS = tl.constexpr(BLOCK // 4)
UNIT = tl.constexpr(2.0**24)  # a half-precision 1 over what the integer 1 is read as


def padded(count: int, least: int = 16) -> int:
    """The next power of two, at least 16: what a side of a tile is."""
    return max(least, triton.next_power_of_2(count))


@lru_cache(maxsize=1024)
@constant
def places(widths: tuple[Widths, ...], repeats: int, device: torch.device) -> Tensor:
    """Row << 8 | bits << 4 | first bit of every coefficient [bundles · repeats, padded] int32, of no bits beyond the last.

    Each bundle `repeats` times, one after the other.
    """
    size, found, begin = padded(max((w.coefficients for w in widths), default=0)), [], 0
    for w in widths:
        own, row = [0] * size, begin
        at = 0
        for count, bits in ((w.eight, 8), (w.four, 4), (w.two, 2)):
            rows = count * bits // 8
            for i in range(count):
                own[at + i] = (row + i % rows) << 8 | bits << 4 | i // rows * bits
            at, row = at + count, row + rows
        found += [own] * repeats
        begin = row
    return torch.tensor(found, dtype=torch.int32, device=device)


def words_of(packed: Tensor) -> Tensor:
    """Blocks [batch, blocks, bytes] as words int32 that begin at 16 bytes and follow each other; a row of zeros for none."""
    if not packed.shape[2]:
        return packed.new_zeros(packed.shape[0], packed.shape[1], BLOCK // 4, dtype=torch.int32)
    aligned = packed.stride(2) == 1 and packed.stride(1) == packed.shape[2] and packed.stride(0) % 16 == 0
    if not aligned or packed.data_ptr() % 16 or packed.storage_offset() % 4:
        packed = packed.clone(memory_format=torch.contiguous_format)
    return packed.view(torch.int32)


@triton.jit
def load_words(base, place, left, stride, BLOCKS: tl.constexpr):
    """Words [coefficients, 16 · BLOCKS] of blocks of `stride` words, of which `left` remain: beyond, the last one again."""
    at = tl.arange(0, _WORDS * BLOCKS)
    inner = at
    if BLOCKS > 1:
        inner = tl.minimum(at // _WORDS, left - 1) * stride + at % _WORDS
    return tl.load(base + (((place >> 8) * _WORDS).to(tl.uint32)[:, None] + inner.to(tl.uint32)[None, :]))


@triton.jit
def integers(words, place, NATURAL: tl.constexpr):
    """u · 2^−24 in half precision [coefficients, tokens]; unless NATURAL, tokens of a word lie as 0, 2, 1, 3."""
    first = (place & 7)[:, None]
    mask = (((1 << ((place >> 4) & 15)) - 1) * 0x10001)[:, None]
    bits = words.to(tl.uint32, bitcast=True)
    even = (bits >> first.to(tl.uint32)) & mask.to(tl.uint32)
    odd = (bits >> (first + 8).to(tl.uint32)) & mask.to(tl.uint32)
    zero, one = even.to(tl.uint16), odd.to(tl.uint16)
    two, three = (even >> 16).to(tl.uint16), (odd >> 16).to(tl.uint16)
    if not NATURAL:
        one, two = two, one
    both = tl.join(tl.join(zero, two), tl.join(one, three))
    return tl.reshape(both, (words.shape[0], _WORD * words.shape[1])).to(tl.float16, bitcast=True)


@triton.jit
def tokens_of(T: tl.constexpr, NATURAL: tl.constexpr):
    """Which tokens the columns of `integers` are."""
    at = tl.arange(0, T)
    if NATURAL:
        return at
    return (at & -4) | ((at & 1) << 1) | ((at >> 1) & 1)


@triton.jit
def power_below(x):
    """The largest power of two up to x ≥ 0, from 2^−126 to 2^126, and one over it, both exact."""
    exponent = tl.minimum(tl.maximum(x.to(tl.int32, bitcast=True) & 0x7F800000, 1 << 23), 253 << 23)
    return exponent.to(tl.float32, bitcast=True), ((254 << 23) - exponent).to(tl.float32, bitcast=True)


@triton.jit
def halves(x):
    """The half-precision number next to x, the one next to what is left, and what is left then."""
    high = x.to(tl.float16)
    rest = x - high.to(tl.float32)
    low = rest.to(tl.float16)
    return high, low, rest - low.to(tl.float32)


@triton.jit
def spread(x, AXIS: tl.constexpr):
    """A number per row, over the tokens of a tile [tokens, rows], or [rows, tokens] where AXIS is 1."""
    return tl.expand_dims(x, AXIS)


@triton.jit
def load_halves(queries, row, rows, C: tl.constexpr, AXIS: tl.constexpr):
    """Prepared queries [C, rows], or [rows, C] where AXIS is 1."""
    c = tl.arange(0, C)
    at = tl.expand_dims(row * C, AXIS) + tl.expand_dims(c, 1 - AXIS)
    return tl.load(queries + at, mask=tl.expand_dims(row < rows, AXIS), other=0.0)


@triton.jit
def products(u, high, low, x, TERMS: tl.constexpr, AXIS: tl.constexpr):
    """x [tokens, rows], or [rows, tokens] where AXIS is 1, and integers times queries, in float32."""
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
def weighed(u, high, low, acc, TERMS: tl.constexpr, AXIS: tl.constexpr):
    """acc [coefficients, rows], or [rows, coefficients] where AXIS is 1, and integers times weights, in float32."""
    if AXIS == 0:
        acc = tl.dot(u, high, acc)
        if TERMS == 2:
            acc = tl.dot(u, low, acc)
    else:
        acc = tl.dot(high, tl.trans(u), acc)
        if TERMS == 2:
            acc = tl.dot(low, tl.trans(u), acc)
    return acc
