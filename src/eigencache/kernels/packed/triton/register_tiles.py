"""Tiles for few queries that stay in registers: numbers from one byte are neighbors in an operand of the tensor cores.

A tensor core takes its operands in pairs of numbers that are neighbors along the summed dimension. For keys, coefficients
are summed, and both halves of a byte are a pair: words go to the lanes that multiply them and are unpacked there, without
passing through shared memory as float16. For values, tokens are summed, and the pairs are t and t + 2 of a word. A
coefficient of 8 bits is two parts of 4 bits (*nibbles*) with weights 1 and 16. Coefficients of 2 bits (*crumbs*) have a
separate tile. Rows of a tile beyond those of the bundle are multiplied by queries of zero, or add to sums that are not
stored.
"""

# Triton specializes arguments, so the checker sees the wrong types here.
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
    """Where the byte rows of every bundle lie, and which coefficients they hold.

    Attributes:
        bundles: int32 [bundles, 5]: first row of 8 and 4 bits, first row of 2 bits, and the numbers of coefficients of 8, of
            4 and of 2 bits.
        nibbles: int32 [bundles, 2 · wide]: the coefficient of each part of each row, row by row; 2^16 is added where the
            weight of the part is 16; −1 means no coefficient.
        crumbs: int32 [bundles, 4 · narrow]: the coefficient of each part of each row of 2 bits; −1 means none.
        wide: rows of 8 and 4 bits in a tile, a power of two.
        narrow: rows of 2 bits in a tile, a power of two, or 0.
    """

    bundles: Tensor
    nibbles: Tensor
    crumbs: Tensor
    wide: int
    narrow: int

    @property
    def parts(self) -> int:
        """Number of parts in the rows of a tile."""
        return 2 * self.wide + 4 * self.narrow


@lru_cache(maxsize=1024)
@constant
def rows_of(widths: tuple[Widths, ...], repeats: int, device: torch.device) -> TileRows:
    """Return the rows of all bundles, each repeated `repeats` times."""
    wide = max(8, *(triton.next_power_of_2(w.eight + w.four // 2) for w in widths))
    most = max(w.two // 4 for w in widths)
    narrow = max(4, triton.next_power_of_2(most)) if most else 0
    bundles, nibbles, crumbs, row = [], [], [], 0
    for w in widths:
        wide_rows, half, quarter = w.eight + w.four // 2, w.four // 2, w.two // 4
        parts = [-1] * (2 * wide)
        parts[: 2 * w.eight] = [i + part * 2**16 for i in range(w.eight) for part in range(2)]
        parts[2 * w.eight : 2 * wide_rows] = [w.eight + i + part * half for i in range(half) for part in range(2)]
        nibbles += [parts] * repeats
        parts = [-1] * (4 * narrow)
        parts[: w.two] = [w.eight + w.four + i + part * quarter for i in range(quarter) for part in range(4)]
        crumbs += [parts] * repeats
        bundles += [(row, row + wide_rows, w.eight, w.four, w.two)] * repeats
        row += wide_rows + quarter
    tensors = (torch.tensor(x, dtype=torch.int32, device=device) for x in (bundles, nibbles, crumbs))
    return TileRows(*tensors, wide, narrow)


@triton.jit
def load_rows(base, first, left, stride, R: tl.constexpr, BLOCKS: tl.constexpr):
    """Load words uint32 [rows, 16 · BLOCKS] from row `first` on; beyond the `left` remaining blocks, the last one again."""
    position = tl.arange(0, _WORDS * BLOCKS)
    inner = position
    if BLOCKS > 1:
        inner = tl.minimum(position // _WORDS, left - 1) * stride + position % _WORDS
    row = tl.minimum(first + tl.arange(0, R), stride // _WORDS - 1) * _WORDS
    return tl.load(base + (row.to(tl.uint32)[:, None] + inner.to(tl.uint32)[None, :])).to(tl.uint32, bitcast=True)


@triton.jit
def _parts(words, first: tl.constexpr, BITS: tl.constexpr):
    """Return one part of tokens t and t + 2 of every word, from bit `first` of their bytes on, as uint16."""
    pair = (words >> first) & (((1 << BITS) - 1) * 0x10001)
    return pair.to(tl.uint16), (pair >> 16).to(tl.uint16)


@triton.jit
def _by_token(words, first: tl.constexpr, BITS: tl.constexpr):
    """Return one part of all tokens [rows, words, 2 (t mod 2), 2 (t ÷ 2)]."""
    zero, two = _parts(words, first, BITS)
    one, three = _parts(words, first + 8, BITS)
    return tl.join(tl.join(zero, one), tl.join(two, three))


@triton.jit
def _keys_of(words, first: tl.constexpr, BITS: tl.constexpr):
    """Return all parts of one token of every word, and of the token two later; last dimensions [parts ÷ 2, 2], or [2]."""
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
    """Return float16 [tokens in the order of `pair_tokens`, parts row by row] of words [rows, words]."""
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
    """Return float16 [rows part by part, tokens in the order 0, 2, 1, 3 of every word] of words [rows, words]."""
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
    """Return the tokens of the rows of `key_tile`: a row with bits h w…w l www is token 2 h + l of word w…www."""
    position = tl.arange(0, T)
    word = (position // 16 * 8) % (T // 4) + position % 8
    return 4 * word + position // (T // 2) * 2 + position // 8 % 2


@triton.jit
def in_words(x):
    """Reorder x [tokens in the order of `pair_tokens`, rows] to the order of tokens of `value_tile`."""
    T: tl.constexpr = x.shape[0]
    M: tl.constexpr = x.shape[1]
    return tl.reshape(tl.permute(tl.reshape(x, (2, T // 32, 2, 8, M)), (1, 3, 2, 0, 4)), (T, M))


@triton.jit
def gather_queries(queries, sources, row, rows, C: tl.constexpr, K: tl.constexpr):
    """Load prepared queries [K, rows] in the order of the parts `sources`, with their weights."""
    source = tl.load(sources + tl.arange(0, K))
    weight = tl.where(source >= 1 << 16, 16.0, 1.0).to(tl.float16)
    on = (source >= 0)[:, None] & (row < rows)[None, :]
    q = tl.load(queries + row[None, :] * C + (source & 0xFFFF)[:, None], mask=on, other=0.0)
    return q * weight[:, None]
