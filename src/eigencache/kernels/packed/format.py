"""The format of packed blocks."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

from eigencache.modes import constant

BLOCK = 64  # tokens


GROUP = 8  # coefficients that share a width


@dataclass(frozen=True)
class Widths:
    """How many coefficients of a bundle take 8, 4 and 2 bits, multiples of 8."""

    eight: int
    four: int
    two: int

    @property
    def coefficients(self) -> int:
        """All of them."""
        return self.eight + self.four + self.two

    @property
    def bits(self) -> int:
        """Bits of a token."""
        return 8 * self.eight + 4 * self.four + 2 * self.two

    @property
    def nbytes(self) -> int:
        """Bytes of a block."""
        return BLOCK * self.bits // 8

    def per_coefficient(self) -> Tensor:
        """Bits of every coefficient [coefficients] int32."""
        return torch.tensor([8] * self.eight + [4] * self.four + [2] * self.two, dtype=torch.int32)


def most_coefficients(widths: Sequence[Widths]) -> int:
    """Of any bundle: what tensors of all are padded to."""
    return max(w.coefficients for w in widths)


@cache
@constant
def largest_integers(widths: tuple[Widths, ...]) -> Tensor:
    """2^b − 1 of every coefficient [bundles, most] float32, zero beyond the last one of a bundle."""
    most = most_coefficients(widths)
    return torch.stack([F.pad(2.0 ** w.per_coefficient() - 1, (0, most - w.coefficients)) for w in widths])


@cache
@constant
def bundles_of(widths: tuple[Widths, ...]) -> Tensor:
    """Per bundle [bundles, 4] int64: its first byte in a block, coefficients of 8, of 8 or 4, and of any bits."""
    found, at = [], 0
    for w in widths:
        found.append((at, w.eight, w.eight + w.four, w.coefficients))
        at += w.nbytes
    return torch.tensor(found)


@cache
@constant
def digits_of(widths: tuple[Widths, ...], six: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Of every row [bundles, most]: the largest integer float32; the shift and mask uint8 that make a digit of it.

    `six` of every bundle: so many of its coefficients have 6 bits and two rows each: the higher 4 bits are the last rows of
    4 bits, the lower 2 the first rows of 2 bits. Empty: none.
    """
    largest = largest_integers(widths)
    most, shifts = largest.clone(), torch.zeros_like(largest, dtype=torch.uint8)
    for i, (w, count) in enumerate(zip(widths, six or (0,) * len(widths), strict=True)):
        high = slice(w.eight + w.four - count, w.eight + w.four)
        most[i, high.start : high.stop + count] = 63
        shifts[i, high] = 2
    return most, shifts, largest.to(torch.uint8)


def pack(codes: Tensor, widths: Sequence[Widths]) -> Tensor:
    """Bytes uint8 [batch, blocks, bytes] of integers uint8 [batch, bundles, most, 64 · blocks]."""
    rows = []
    for own, w in zip(codes.unflatten(-1, (-1, BLOCK)).unbind(1), widths, strict=True):
        for part, bits in zip(own[:, : w.coefficients].split([w.eight, w.four, w.two], 1), (8, 4, 2), strict=True):
            each = 8 // bits
            packed = torch.zeros_like(part[:, : part.shape[1] // each])
            for i, plane in enumerate(part.chunk(each, 1) if part.shape[1] else ()):
                packed |= plane << (bits * i)
            rows.append(packed.transpose(1, 2).flatten(2))
    return torch.cat(rows, -1)


def unpack(packed: Tensor, widths: Sequence[Widths]) -> Tensor:
    """The integers uint8 [batch, bundles, most, 64 · blocks] again, zero beyond the last coefficient of a bundle."""
    bundles, most = [], most_coefficients(widths)
    for own, w in zip(packed.split([w.nbytes for w in widths], -1), widths, strict=True):
        rows = own.unflatten(-1, (-1, BLOCK)).transpose(1, 2)
        found = []
        for part, bits in zip(rows.split([w.eight, w.four // 2, w.two // 4], 1), (8, 4, 2), strict=True):
            found += [(part >> shift) & (2**bits - 1) for shift in range(0, 8, bits)]
        bundles.append(F.pad(torch.cat(found, 1).flatten(2), (0, 0, 0, most - w.coefficients)))
    return torch.stack(bundles, 1)
