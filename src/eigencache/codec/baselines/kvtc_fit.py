"""Fitting `kvtc`: principal components once for keys and once for values, then formats for any budget of bits."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from eigencache.codec.baselines.allocation import ComponentGroup, GroupFormat, allocate
from eigencache.codec.baselines.kvtc import KVTC, TransformedKind
from eigencache.codec.baselines.kvtc_formats import BITS, from_codes, group_bits, shift_and_scale, to_codes
from eigencache.codec.baselines.registry import BaselineInputs, baseline
from eigencache.codec.layout import Layout
from eigencache.codec.sinks_and_window import WithSinksAndWindow
from eigencache.errors import CodecError

SIZES = (1, 16, 64, 256, 1024)
_AT_ONCE = 2**22  # numbers whose errors are computed at a time
_BLOCK = 4096  # dimensions that are converted to float64 at a time
Sample = tuple[Layout, Tensor]  # layout of keys or of values of all layers, calibration vectors [n, width]


@dataclass(frozen=True, eq=False)
class Components:
    """Mean, principal components [width, rank] and the error of every format, of keys or of values."""

    layout: Layout
    mean: Tensor
    basis: Tensor
    dropped: np.ndarray
    choices: list[GroupFormat]

    def at(self, bits_per_value: float) -> TransformedKind:
        """Return the groups of least error at a budget; components in no group are dropped."""
        groups = allocate(self.dropped, self.choices, int(bits_per_value * self.layout.width))
        columns = [i for group in groups for i in range(group.start, group.start + group.size)]
        ends = np.cumsum([0, *(group.size for group in groups)]).tolist()
        moved = tuple(ComponentGroup(end, group.size, group.kind) for end, group in zip(ends, groups, strict=False))
        return TransformedKind(self.layout, self.mean, self.basis[:, columns].contiguous(), moved)


@dataclass(frozen=True, eq=False)
class FittedKVTC:
    """The components of keys and values, which do not depend on the budget."""

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
        """Return the codec at a budget.

        Args:
            bits_per_value: Budget before DEFLATE.
            sinks: First positions that are not transformed.
            window: Last tokens that stay in 16 bits.
            sink_format: How sinks are stored.
        """
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
    """Fit principal components and measure the error of every format.

    The time is proportional to `allocation_vectors` × rank × Σ sizes.

    Args:
        samples: One sample for keys and one for values.
        dtype: The model's.
        rank: Largest number of components; default: no limit.
        sizes: Numbers of components that a group may have.
        held_out: Vectors on which errors are measured, one tensor per sample; default: the calibration vectors, which
            underestimate the error of the last components where there are few vectors.
        allocation_vectors: How many of those vectors are used, evenly spaced.

    Raises:
        CodecError: A sample has fewer than two vectors, another width than its layout, or NaN.
    """
    tried = held_out if held_out is not None else [vectors for _, vectors in samples]
    kinds = []
    for (layout, vectors), others in zip(samples, tried, strict=True):
        for given in (vectors, others):
            if given.ndim != 2 or given.shape[1] != layout.width or len(given) < 2 or not given.isfinite().all():
                shape = tuple(given.shape)
                raise CodecError(f"kvtc: calibration vectors {shape}: give at least two finite ones of width {layout.width}")
        spaced = torch.linspace(0, len(others) - 1, min(allocation_vectors, len(others)), device=others.device).long()
        kinds.append(_components(layout, vectors, others[spaced], rank, sizes))
    return FittedKVTC(tuple(kinds), dtype)


def _components(layout: Layout, vectors: Tensor, others: Tensor, rank: int | None, sizes: tuple[int, ...]) -> Components:
    """Return the components of `vectors`, and the errors of their formats on `others`."""
    mean, basis = principal_components(vectors, rank)
    y = (others.float() - mean) @ basis
    dropped = y.double().square().sum(0).cpu().numpy()
    choices = [choice for size in sizes if size <= basis.shape[1] for choice in _choices(y, size)]
    return Components(layout, mean, basis, dropped, choices)


def principal_components(vectors: Tensor, rank: int | None = None) -> tuple[Tensor, Tensor]:
    """Return mean and principal components.

    Args:
        vectors: Calibration vectors [n, width].
        rank: Largest number of components; default: no limit.

    Returns:
        The mean [width] and orthonormal components [width, r] in float32, by falling variance, with r ≤ rank, width and
        n − 1. Components whose variance is below 10⁻⁹ of the largest are left out, except the first.
    """
    mean = vectors.mean(0, dtype=torch.float64)
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
    eigenvalues, eigenvectors = torch.linalg.eigh(matrix)
    eigenvalues, eigenvectors = eigenvalues.flip(0), eigenvectors.flip(1)
    used = max(1, int((eigenvalues > 1e-9 * eigenvalues[0]).sum()))
    used = min(used, n - 1, width, rank or width)
    if width < n:
        return mean.float(), eigenvectors[:, :used].float()
    scaled = eigenvectors[:, :used] / eigenvalues[:used].clamp_min(torch.finfo(torch.float64).tiny).sqrt()
    blocks = zip(vectors.split(_BLOCK, 1), mean.split(_BLOCK), strict=True)
    return mean.float(), torch.cat([((x.double() - center).mT @ scaled).float() for x, center in blocks])


def _choices(y: Tensor, size: int) -> list[GroupFormat]:
    """Return the error, summed over vectors, of every format for `size` components from every start on."""
    windows = y.unfold(1, size, 1)  # [n, starts, size], a view
    errors: dict[str, list[Tensor]] = {kind: [] for kind in BITS}
    for x in windows.split(max(1, _AT_ONCE // (len(y) * size)), 1):
        for kind in BITS:
            shift, scale = shift_and_scale(x, kind)
            again = from_codes(to_codes(x, kind, shift, scale), kind, shift, scale)
            errors[kind].append((again - x).square().sum(-1).double().sum(0))
    return [GroupFormat(kind, size, group_bits(kind, size), torch.cat(e).cpu().numpy()) for kind, e in errors.items()]


def _published(inputs: BaselineInputs, *, sinks: int = 4, window: int = 128) -> dict[str, WithSinksAndWindow]:
    """Return one codec per rate; the components are fitted once."""
    fitted = inputs.once("kvtc", lambda: fit_kvtc(inputs.by_slot, inputs.dtype))
    return {f"{bits:g}": fitted.at(bits, sinks=sinks, window=window) for bits in inputs.rates}


@baseline("kvtc", "KVTC: all layers, separate K and V, 4 sinks in fp8, last 128 tokens in 16 bits", fitted=True)
def kvtc_codecs(inputs: BaselineInputs) -> dict[str, WithSinksAndWindow]:
    """Return one codec per rate."""
    return _published(inputs)


@baseline("kvtc-sinks", "KVTC: 4 sinks in fp8, no window", fitted=True)
def kvtc_codecs_with_sinks(inputs: BaselineInputs) -> dict[str, WithSinksAndWindow]:
    """Return one codec per rate, without a window."""
    return _published(inputs, window=0)


@baseline("kvtc-no-window", "KVTC without sinks and window", fitted=True)
def kvtc_codecs_without_window(inputs: BaselineInputs) -> dict[str, WithSinksAndWindow]:
    """Return one codec per rate that transforms all tokens."""
    return _published(inputs, sinks=0, window=0)
