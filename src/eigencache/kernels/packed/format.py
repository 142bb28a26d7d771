"""The format of packed blocks: coefficients of 64 tokens as integers of 8, 4 and 2 bits (THEORY 8).

A *bundle* is a group of KV heads that share a basis; their vectors are projected to coefficients together. A *block* holds
64 tokens of one layer, its bundles one after the other. Within a bundle, the coefficients of 8 bits come first, then those
of 4 bits, then those of 2 bits. A byte row is 64 bytes, one byte per token, and holds 1, 2 or 4 coefficients:

* 8 bits: byte row i holds coefficient i.
* 4 bits, g coefficients: byte row i holds coefficient i in its low half and i + g/2 in its high half.
* 2 bits, g coefficients: byte row i holds coefficients i, i + g/4, i + g/2 and i + 3g/4, from the lowest bits up.

An integer u of b bits represents u - (2^b - 1)/2 quantization steps. The quantizer is static and symmetric and has no exact
zero. Steps are folded into the queries and into the decoder that expands weighted sums, so per token attention multiplies
only integers, and the offset (2^b - 1)/2 is one vector for all tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

from eigencache.modes import constant

BLOCK = 64  # tokens of a block
GROUP = 8  # coefficients that share a bit width


@dataclass(frozen=True)
class Widths:
    """Numbers of coefficients of a bundle that have 8, 4 and 2 bits, each a multiple of `GROUP`."""

    eight: int
    four: int
    two: int

    @property
    def coefficients(self) -> int:
        """Coefficients of any width."""
        return self.eight + self.four + self.two

    @property
    def bits(self) -> int:
        """Bits per token."""
        return 8 * self.eight + 4 * self.four + 2 * self.two

    @property
    def nbytes(self) -> int:
        """Bytes per block."""
        return BLOCK * self.bits // 8

    def per_coefficient(self) -> Tensor:
        """Return the bits of every coefficient [coefficients] int32."""
        return torch.tensor([8] * self.eight + [4] * self.four + [2] * self.two, dtype=torch.int32)


def most_coefficients(widths: Sequence[Widths]) -> int:
    """Return the largest number of coefficients of a bundle, `most` in shapes: tensors of all bundles are padded to it."""
    return max(w.coefficients for w in widths)


@cache
@constant
def largest_integers(widths: tuple[Widths, ...]) -> Tensor:
    """Return 2^b - 1 of every coefficient [bundles, most] float32; zero beyond the last coefficient of a bundle."""
    most = most_coefficients(widths)
    return torch.stack([F.pad(2.0 ** w.per_coefficient() - 1, (0, most - w.coefficients)) for w in widths])


@cache
@constant
def bundle_layout(widths: tuple[Widths, ...]) -> Tensor:
    """Return, per bundle, where its bytes and coefficients lie [bundles, 4] int64.

    The columns are the first byte in a block, and the numbers of coefficients of 8 bits, of 8 or 4 bits, and of any bits.
    """
    layout, first_byte = [], 0
    for w in widths:
        layout.append((first_byte, w.eight, w.eight + w.four, w.coefficients))
        first_byte += w.nbytes
    return torch.tensor(layout)


@cache
@constant
def digit_layout(widths: tuple[Widths, ...], six: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Return how rows of coefficients become stored digits: a row stores (u >> shift) & mask.

    A coefficient of 6 bits is stored as two digits in two rows: its higher 4 bits in one of the last rows of 4 bits, its
    lower 2 bits in one of the first rows of 2 bits.

    Args:
        widths: widths of every bundle.
        six: number of coefficients of 6 bits of every bundle; empty means none.

    Returns:
        The largest integer u of every row float32, the shifts uint8 and the masks uint8, each [bundles, most].
    """
    largest = largest_integers(widths)
    limits, shifts = largest.clone(), torch.zeros_like(largest, dtype=torch.uint8)
    for i, (w, count) in enumerate(zip(widths, six or (0,) * len(widths), strict=True)):
        high = slice(w.eight + w.four - count, w.eight + w.four)
        limits[i, high.start : high.stop + count] = 63
        shifts[i, high] = 2
    return limits, shifts, largest.to(torch.uint8)


def pack(codes: Tensor, widths: Sequence[Widths]) -> Tensor:
    """Pack integers uint8 [batch, bundles, most, 64 · blocks] into bytes uint8 [batch, blocks, bytes]."""
    rows = []
    for bundle, w in zip(codes.unflatten(-1, (-1, BLOCK)).unbind(1), widths, strict=True):
        for part, bits in zip(bundle[:, : w.coefficients].split([w.eight, w.four, w.two], 1), (8, 4, 2), strict=True):
            per_byte = 8 // bits
            packed = torch.zeros_like(part[:, : part.shape[1] // per_byte])
            for i, plane in enumerate(part.chunk(per_byte, 1) if part.shape[1] else ()):
                packed |= plane << (bits * i)
            rows.append(packed.transpose(1, 2).flatten(2))
    return torch.cat(rows, -1)


def unpack(packed: Tensor, widths: Sequence[Widths]) -> Tensor:
    """Unpack bytes [batch, blocks, bytes] into integers uint8 [batch, bundles, most, 64 · blocks], padded with zeros."""
    bundles, most = [], most_coefficients(widths)
    for data, w in zip(packed.split([w.nbytes for w in widths], -1), widths, strict=True):
        rows = data.unflatten(-1, (-1, BLOCK)).transpose(1, 2)
        codes = []
        for part, bits in zip(rows.split([w.eight, w.four // 2, w.two // 4], 1), (8, 4, 2), strict=True):
            codes += [(part >> shift) & (2**bits - 1) for shift in range(0, 8, bits)]
        bundles.append(F.pad(torch.cat(codes, 1).flatten(2), (0, 0, 0, most - w.coefficients)))
    return torch.stack(bundles, 1)
