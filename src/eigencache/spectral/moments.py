"""Streaming second-order moments: parts computed anywhere add up to the same result as one pass (THEORY 2).

Memory is `folds x blocks x width^2` numbers whatever the number of vectors. Folds are disjoint groups of whole
sequences: they give the halves for held-out statistics and the units that a bootstrap resamples. A product runs
in the dtype of its input, at least float32, on vectors centered on the running mean; sums are kept in float64.
Combination of parts: Chan, Golub & LeVeque 1979.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from eigencache.errors import StatisticsError

_PANEL = 128  # columns per panel of a wide Gram matrix: only panels on or right of the diagonal are multiplied


@dataclass(frozen=True)
class SecondOrder:
    """Count, mean [p] and scatter about the mean [p, p] of one set of vectors, in float64."""

    count: float
    mean: Tensor
    scatter: Tensor

    @property
    def covariance(self) -> Tensor:
        """Scatter / n [p, p], so that `second_moment` minus `covariance` is exactly mean meanᵀ."""
        return self.scatter / self.count

    @property
    def second_moment(self) -> Tensor:
        """E[x xᵀ] about zero [p, p]."""
        return self.covariance + torch.outer(self.mean, self.mean)


def add_gram(out: Tensor, x: Tensor) -> None:
    """out += xᵀx per block, in place, upper triangle only: out [blocks, p, p] float64, x [n, blocks, p].

    Of a wide product only the panels on or right of the diagonal are multiplied and added.
    """
    x = x.transpose(0, 1)
    width = x.shape[-1]
    for start in range(0, width, _PANEL):
        stop = min(start + _PANEL, width)
        out[:, start:stop, start:] += x[..., start:stop].mT @ x[..., start:]


def _symmetric(upper: Tensor) -> Tensor:
    """The symmetric matrix whose upper triangle is given [p, p]."""
    return upper.triu() + upper.triu(1).mT


def add_outer(out: Tensor, factor: float, x: Tensor) -> None:
    """out += factor · x xᵀ per block, in place: out [blocks, p, p] or [p, p], x [blocks, p] or [p]."""
    out, x = out if out.ndim == 3 else out[None], x if x.ndim == 2 else x[None]
    out.baddbmm_(x.unsqueeze(-1), x.unsqueeze(-2), alpha=factor)


def _combine(count: float, mean: Tensor, scatter: Tensor, n: float, shift: Tensor, more: Tensor | None) -> None:
    """Add in place a part of n vectors with mean `mean + shift` and scatter `more` about it (None: already added)."""
    total = count + n
    if more is not None:
        scatter += more
    add_outer(scatter, count * n / total, shift)
    mean += (n / total) * shift


class Moments:
    """n, Σx and Σxxᵀ of `blocks` kinds of vectors side by side, per fold, and the scatter of the sequences' means.

    Attributes: `count` [folds], `mean` [folds, blocks, width], `scatter` [folds, blocks, width, width] about the
    fold's mean, `between` [blocks, width, width] = Σ_s n_s (m_s − m)(m_s − m)ᵀ over sequences s, `sequences`.
    Of `scatter` and `between` only the upper triangle is kept up; `total` and `between_sequences` are symmetric.
    """

    def __init__(self, width: int, *, blocks: int = 1, folds: int = 1, device: str | torch.device = "cpu") -> None:
        options = {"dtype": torch.float64, "device": device}
        self.width, self.blocks, self.folds = width, blocks, folds
        self.count = torch.zeros(folds, dtype=torch.float64)
        self.mean = torch.zeros(folds, blocks, width, **options)
        self.scatter = torch.zeros(folds, blocks, width, width, **options)
        self.between = torch.zeros(blocks, width, width, **options)
        self._total_mean = torch.zeros(blocks, width, **options)
        self.sequences = 0
        self.precision = 0.0  # ε of the coarsest products so far: eigenvalues below ε λ₁ are rounding

    @staticmethod
    def nbytes(width: int, blocks: int = 1, folds: int = 1) -> int:
        """Bytes that a `Moments` of this size holds."""
        return 8 * blocks * (width * width * (folds + 1) + width * (folds + 1))

    def update(self, vectors: Tensor, lengths: Sequence[int] | None = None, fold: int = 0) -> None:
        """Add whole sequences to one fold: `vectors` [n, blocks, width], `lengths` of the sequences in them (sum n)."""
        lengths = list(lengths or [len(vectors)])
        if vectors.shape[1:] != (self.blocks, self.width) or sum(lengths) != len(vectors) or min(lengths) < 1:
            raise StatisticsError(
                f"vectors {tuple(vectors.shape)}, sequences {lengths}: not of {self.blocks} x {self.width}"
            )
        n = len(vectors)
        before, total_before = float(self.count[fold]), float(self.count.sum())
        dtype = torch.promote_types(vectors.dtype, torch.float32)
        origin = self.mean[fold].clone() if before else vectors.to(torch.float64).mean(0)
        self.precision = max(self.precision, torch.finfo(dtype).eps)
        x = vectors.to(dtype) - origin.to(dtype)
        origin = origin.to(dtype).to(torch.float64)  # what was really subtracted
        sums = torch.stack([part.sum(0, dtype=torch.float64) for part in x.split(lengths)])
        shift = sums.sum(0) / n
        add_gram(self.scatter[fold], x)
        add_outer(self.scatter[fold], -n, shift)
        _combine(before, self.mean[fold], self.scatter[fold], n, origin + shift - self.mean[fold], None)

        weights = torch.tensor(lengths, dtype=torch.float64, device=x.device)[:, None, None]
        deviations = (sums / weights - shift) * weights.sqrt()
        add_gram(self.between, deviations)
        _combine(total_before, self._total_mean, self.between, n, origin + shift - self._total_mean, None)
        self.count[fold] += n
        self.sequences += len(lengths)

    def merge(self, other: "Moments") -> None:
        """Add what another part has seen, fold by fold; the result is that of one pass over both."""
        if (self.width, self.blocks, self.folds) != (other.width, other.blocks, other.folds):
            raise StatisticsError("moments of different shapes cannot be merged")
        if other.count.sum():
            shift = other._total_mean - self._total_mean
            _combine(float(self.count.sum()), self._total_mean, self.between, float(other.count.sum()), shift, other.between)
        for fold in range(self.folds):
            if other.count[fold]:
                shift = other.mean[fold] - self.mean[fold]
                n = float(other.count[fold])
                _combine(float(self.count[fold]), self.mean[fold], self.scatter[fold], n, shift, other.scatter[fold])
        self.count += other.count
        self.sequences += other.sequences
        self.precision = max(self.precision, other.precision)

    def part(self, block: int, start: int = 0, stop: int | None = None) -> "Moments":
        """The moments of dimensions start:stop of one block, sharing memory: heads are parts of their layer."""
        view = object.__new__(Moments)
        columns = slice(start, self.width if stop is None else stop)
        view.blocks, view.folds, view.count, view.sequences = 1, self.folds, self.count, self.sequences
        view.mean = self.mean[:, block : block + 1, columns]
        view.scatter = self.scatter[:, block : block + 1, columns, columns]
        view.between = self.between[block : block + 1, columns, columns]
        view._total_mean = self._total_mean[block : block + 1, columns]
        view.width, view.precision = view.mean.shape[-1], self.precision
        return view

    def total(self, block: int = 0, folds: Sequence[int] | None = None) -> SecondOrder:
        """Count, mean and scatter of one block over all folds, or over the given ones."""
        chosen = [f for f in (range(self.folds) if folds is None else folds) if self.count[f]]
        if not chosen:
            raise StatisticsError("no vectors were seen")
        mean, scatter = self.mean[chosen[0], block].clone(), self.scatter[chosen[0], block].clone()
        count = float(self.count[chosen[0]])
        for fold in chosen[1:]:
            n = float(self.count[fold])
            _combine(count, mean, scatter, n, self.mean[fold, block] - mean, self.scatter[fold, block])
            count += n
        return SecondOrder(count, mean, _symmetric(scatter))

    def between_sequences(self, block: int = 0) -> Tensor:
        """Scatter of the sequences' means about the total mean, each weighted by its length [p, p]."""
        return _symmetric(self.between[block])
