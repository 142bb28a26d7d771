"""Fitting `kvtc`: principal components once per kind, then formats for any budget, which the codes never exceed."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from eigencache.codec.baselines.allocation import ComponentGroup, GroupFormat, allocate
from eigencache.codec.baselines.kvtc import KVTC, TransformedKind
from eigencache.codec.baselines.kvtc_formats import BITS, from_codes, group_bits, shift_and_scale, to_codes
from eigencache.codec.layout import Layout
from eigencache.codec.sinks_and_window import WithSinksAndWindow
from eigencache.errors import CodecError

SIZES = (1, 16, 64, 256, 1024)
_AT_ONCE = 2**22  # numbers
_BLOCK = 4096  # dimensions that are taken to float64 at once
Sample = tuple[Layout, Tensor]  # keys or values of all layers, and calibration vectors of them [n, width]


@dataclass(frozen=True, eq=False)
class Components:
    """Mean, principal components [width, rank] and the error of every choice of format, of one kind."""

    layout: Layout
    mean: Tensor
    basis: Tensor
    dropped: np.ndarray
    choices: list[GroupFormat]

    def at(self, bits_per_value: float) -> TransformedKind:
        """The groups of least error at a budget; components that are in none are not kept."""
        groups = allocate(self.dropped, self.choices, int(bits_per_value * self.layout.width))
        columns = [i for group in groups for i in range(group.start, group.start + group.size)]
        ends = np.cumsum([0, *(group.size for group in groups)]).tolist()
        moved = tuple(ComponentGroup(end, group.size, group.kind) for end, group in zip(ends, groups, strict=False))
        return TransformedKind(self.layout, self.mean, self.basis[:, columns].contiguous(), moved)


@dataclass(frozen=True, eq=False)
class FittedKVTC:
    """What does not depend on the budget: components of every kind."""

    kinds: tuple[Components, ...]
    dtype: torch.dtype

    def at(
        self,
        bits_per_value: float,
        *,
        sinks: int = 4,
        window: int = 128,
        sink_format: Literal["16 bit", "fp8"] = "fp8",
    ) -> WithSinksAndWindow:
        """The codec at a budget before DEFLATE, with the first and last tokens apart; 0 and 0 for none."""
        kinds = tuple(kind.at(bits_per_value) for kind in self.kinds)
        return WithSinksAndWindow(
            KVTC(kinds, self.dtype, f"kvtc {bits_per_value:g} bit"), self.dtype, sinks, window, sink_format
        )


def fit_kvtc(
    samples: Sequence[Sample],
    dtype: torch.dtype,
    *,
    rank: int | None = None,
    sizes: tuple[int, ...] = SIZES,
    held_out: Sequence[Tensor] | None = None,
    allocation_vectors: int = 256,
) -> FittedKVTC:
    """Components and errors from calibration vectors, float32 [n, width], of keys and of values: one sample each.

    `rank`: components at most, by default all there are. Errors are measured on `allocation_vectors` evenly spaced ones of
    `held_out`, one tensor per sample, or of the calibration vectors themselves, which flatter the last components where
    there are hardly more vectors than dimensions. Time goes with their number × rank × Σ sizes. Raises `CodecError` for
    fewer than two vectors, NaN, and vectors that are not the layout's.
    """
    tried = held_out if held_out is not None else [vectors for _, vectors in samples]
    kinds = []
    for (layout, vectors), others in zip(samples, tried, strict=True):
        for given in (vectors, others):
            if given.ndim != 2 or given.shape[1] != layout.width or len(given) < 2 or not given.isfinite().all():
                shape = tuple(given.shape)
                raise CodecError(f"kvtc: calibration vectors {shape} where two or more finite ones of {layout.width} belong")
        spaced = torch.linspace(0, len(others) - 1, min(allocation_vectors, len(others)), device=others.device).long()
        kinds.append(_components(layout, vectors, others[spaced], rank, sizes))
    return FittedKVTC(tuple(kinds), dtype)


def _components(layout: Layout, vectors: Tensor, others: Tensor, rank: int | None, sizes: tuple[int, ...]) -> Components:
    """Components of `vectors`, and what every format of them errs by on `others`."""
    mean, basis = principal_components(vectors, rank)
    y = (others.float() - mean) @ basis
    dropped = y.double().square().sum(0).cpu().numpy()
    choices = [choice for size in sizes if size <= basis.shape[1] for choice in _choices(y, size)]
    return Components(layout, mean, basis, dropped, choices)


def principal_components(vectors: Tensor, rank: int | None = None) -> tuple[Tensor, Tensor]:
    """Mean [width] and orthonormal components [width, r], float32, by falling variance; r ≤ rank, width and n − 1.

    Directions whose variance is rounding (below 10⁻⁹ of the largest) are left out, all but the first.
    """
    mean = vectors.double().mean(0)
    n, width = vectors.shape
    matrix = torch.zeros(2 * [min(n, width)], dtype=torch.float64, device=vectors.device)
    if width < n:
        for rows in vectors.split(_BLOCK):
            x = rows.double() - mean
            matrix += x.mT @ x
    else:
        for columns, center in zip(vectors.split(_BLOCK, 1), mean.split(_BLOCK), strict=True):
            x = columns.double() - center
            matrix += x @ x.mT
    eigenvalues, found = torch.linalg.eigh(matrix)
    eigenvalues, found = eigenvalues.flip(0), found.flip(1)
    used = max(1, int((eigenvalues > 1e-9 * eigenvalues[0]).sum()))
    used = min(used, n - 1, width, rank or width)
    if width < n:
        return mean.float(), found[:, :used].float()
    scaled = found[:, :used] / eigenvalues[:used].clamp_min(torch.finfo(torch.float64).tiny).sqrt()
    blocks = zip(vectors.split(_BLOCK, 1), mean.split(_BLOCK), strict=True)
    return mean.float(), torch.cat([((x.double() - center).mT @ scaled).float() for x, center in blocks])


def _choices(y: Tensor, size: int) -> list[GroupFormat]:
    """The error of every format for `size` components from every start on, summed over vectors."""
    windows = y.unfold(1, size, 1)  # [n, starts, size], a view
    errors: dict[str, list[Tensor]] = {kind: [] for kind in BITS}
    for x in windows.split(max(1, _AT_ONCE // (len(y) * size)), 1):
        for kind in BITS:
            shift, scale = shift_and_scale(x, kind)
            again = from_codes(to_codes(x, kind, shift, scale), kind, shift, scale)
            errors[kind].append((again - x).square().sum(-1).double().sum(0))
    return [GroupFormat(kind, size, group_bits(kind, size), torch.cat(e).cpu().numpy()) for kind, e in errors.items()]
