"""Tiles for a few queries: bytes stay in registers, because what lies in one byte lies side by side in an operand.

A tensor core takes its numbers in pairs that follow each other along what is summed up. For keys that is coefficients: both
halves of a byte are a pair, so that words go to the lanes that multiply them and are unpacked there, never through shared
memory as halves. For values it is tokens: t and t + 2 of a word. Rows of 8 bits are two of 4, of weights 1 and 16; rows of 2
bits are a tile of their own. What a tile has beyond a bundle's rows meets queries of zero, and sums that nobody keeps.
"""
# What a kernel is called with is not what its parameters are inside of it.
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false, reportIndexIssue=false
# pyright: reportAttributeAccessIssue=false

from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from eigencache.kernels.packed.format import BLOCK, Widths
from eigencache.modes import constant

_WORDS = tl.constexpr(BLOCK // 4)


@dataclass(frozen=True, eq=False)
class TileRows:
    """Where the rows of every bundle are, and what they hold.

    `bundles` [bundles, 5] int32: the first row of 8 and of 4 bits, the first of 2, coefficients of 8, of 4 and of 2 bits.
    `nibbles` [bundles, 2 · wide] and `crumbs` [bundles, 4 · narrow] int32: the coefficient that is each part of each row in
    turn, + 2^16 where its weight is 16, −1 for none. `wide` and `narrow`, of rows of 2 bits, are powers of two, or none.
    """

    bundles: Tensor
    nibbles: Tensor
    crumbs: Tensor
    wide: int
    narrow: int

    @property
    def parts(self) -> int:
        """Of the rows of a tile."""
        return 2 * self.wide + 4 * self.narrow


@lru_cache(maxsize=1024)
@constant
def rows_of(widths: tuple[Widths, ...], repeats: int, device: torch.device) -> TileRows:
    """Rows of all bundles, each `repeats` times."""
    wide = max(8, *(triton.next_power_of_2(w.eight + w.four // 2) for w in widths))
    most = max(w.two // 4 for w in widths)
    narrow = max(4, triton.next_power_of_2(most)) if most else 0
    bundles, nibbles, crumbs, row = [], [], [], 0
    for w in widths:
        both, half, quarter = w.eight + w.four // 2, w.four // 2, w.two // 4
        own = [-1] * (2 * wide)
        own[: 2 * w.eight] = [i + part * 2**16 for i in range(w.eight) for part in range(2)]
        own[2 * w.eight : 2 * both] = [w.eight + i + part * half for i in range(half) for part in range(2)]
        nibbles += [own] * repeats
        own = [-1] * (4 * narrow)
        own[: w.two] = [w.eight + w.four + i + part * quarter for i in range(quarter) for part in range(4)]
        crumbs += [own] * repeats
        bundles += [(row, row + both, w.eight, w.four, w.two)] * repeats
        row += both + quarter
    tensors = (torch.tensor(x, dtype=torch.int32, device=device) for x in (bundles, nibbles, crumbs))
    return TileRows(*tensors, wide, narrow)


@triton.jit
def load_rows(base, first, left, stride, R: tl.constexpr, BLOCKS: tl.constexpr):
    """Words uint32 [rows, 16 · BLOCKS] from row `first` on of blocks of `stride` words; beyond `left` blocks, the last."""
    at = tl.arange(0, _WORDS * BLOCKS)
    inner = at
    if BLOCKS > 1:
        inner = tl.minimum(at // _WORDS, left - 1) * stride + at % _WORDS
    row = tl.minimum(first + tl.arange(0, R), stride // _WORDS - 1) * _WORDS
    return tl.load(base + (row.to(tl.uint32)[:, None] + inner.to(tl.uint32)[None, :])).to(tl.uint32, bitcast=True)


@triton.jit
def _parts(words, first: tl.constexpr, BITS: tl.constexpr):
    """Two tokens of one part of every byte, t and t + 2, from bit `first` of their bytes on, as uint16."""
    both = (words >> first) & (((1 << BITS) - 1) * 0x10001)
    return both.to(tl.uint16), (both >> 16).to(tl.uint16)


@triton.jit
def _by_token(words, first: tl.constexpr, BITS: tl.constexpr):
    """[rows, words, 2 (t mod 2), 2 (t ÷ 2)] of one part."""
    zero, two = _parts(words, first, BITS)
    one, three = _parts(words, first + 8, BITS)
    return tl.join(tl.join(zero, one), tl.join(two, three))


@triton.jit
def _keys_of(words, first: tl.constexpr, BITS: tl.constexpr):
    """All parts of one token of every word and of the token two later, the last sides [parts ÷ 2, 2], or [2]."""
    a, a_later = _parts(words, first, BITS)
    b, b_later = _parts(words, first + BITS, BITS)
    now, later = tl.join(a, b), tl.join(a_later, b_later)
    if BITS == 2:
        c, c_later = _parts(words, first + 4, BITS)
        d, d_later = _parts(words, first + 6, BITS)
        now = tl.join(tl.join(a, c), tl.join(b, d))
        later = tl.join(tl.join(a_later, c_later), tl.join(b_later, d_later))
    return now, later


@triton.jit
def key_tile(words, BITS: tl.constexpr):
    """Halves [tokens as `pair_tokens`, parts of rows in turn] of words [rows, words]."""
    R: tl.constexpr = words.shape[0]
    W: tl.constexpr = words.shape[1]
    zero, two = _keys_of(words, 0, BITS)
    one, three = _keys_of(words, 8, BITS)
    x = tl.join(tl.join(zero, two), tl.join(one, three))
    if BITS == 4:
        x = tl.permute(tl.reshape(x, (R, W // 8, 8, 2, 2, 2)), (4, 1, 5, 2, 0, 3))
    else:
        x = tl.permute(tl.reshape(x, (R, W // 8, 8, 2, 2, 2, 2)), (5, 1, 6, 2, 0, 3, 4))
    return tl.reshape(x, (4 * W, R * (8 // BITS))).to(tl.float16, bitcast=True)


@triton.jit
def value_tile(words, BITS: tl.constexpr):
    """Halves [parts, then rows; tokens as 0, 2, 1, 3 of every word] of words [rows, words]."""
    R: tl.constexpr = words.shape[0]
    W: tl.constexpr = words.shape[1]
    a = tl.reshape(_by_token(words, 0, BITS), (R, 4 * W))
    b = tl.reshape(_by_token(words, BITS, BITS), (R, 4 * W))
    if BITS == 4:
        x = tl.permute(tl.join(a, b), (2, 0, 1))
    else:
        c = tl.reshape(_by_token(words, 4, BITS), (R, 4 * W))
        d = tl.reshape(_by_token(words, 6, BITS), (R, 4 * W))
        x = tl.permute(tl.join(tl.join(a, c), tl.join(b, d)), (2, 3, 0, 1))
    return tl.reshape(x, (R * (8 // BITS), 4 * W)).to(tl.float16, bitcast=True)


@triton.jit
def pair_tokens(T: tl.constexpr):
    """Which tokens the rows of `key_tile` are: of row bits h w…w l www, word w…www and in it token 2 h + l."""
    at = tl.arange(0, T)
    word = (at // 16 * 8) % (T // 4) + at % 8
    return 4 * word + at // (T // 2) * 2 + at // 8 % 2


@triton.jit
def in_words(x):
    """Rows of [tokens as `pair_tokens`, rows] in the order of `value_tile`."""
    T: tl.constexpr = x.shape[0]
    M: tl.constexpr = x.shape[1]
    return tl.reshape(tl.permute(tl.reshape(x, (2, T // 32, 2, 8, M)), (1, 3, 2, 0, 4)), (T, M))


@triton.jit
def gather_queries(queries, sources, row, rows, C: tl.constexpr, K: tl.constexpr):
    """Prepared queries [K, rows] as the parts of rows want them."""
    source = tl.load(sources + tl.arange(0, K))
    weight = tl.where(source >= 1 << 16, 16.0, 1.0).to(tl.float16)
    on = (source >= 0)[:, None] & (row < rows)[None, :]
    q = tl.load(queries + row[None, :] * C + (source & 0xFFFF)[:, None], mask=on, other=0.0)
    return q * weight[:, None]
