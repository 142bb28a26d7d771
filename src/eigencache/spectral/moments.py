"""Streaming second-order moments; merged parts equal the result of one pass (THEORY 2).

Memory is `folds × blocks × width²` values, independent of the number of vectors. Folds are disjoint groups of whole
sequences; they supply the halves for held-out statistics and the units of the bootstrap. Products are computed in the
dtype of the input, at least float32, on vectors centered on the running mean, and summed in float64. Parts are combined
by the formulas of Chan, Golub & LeVeque 1979.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from eigencache.errors import StatisticsError

_PANEL = 128  # columns per panel of a wide Gram matrix: only panels on or right of the diagonal are multiplied


@dataclass(frozen=True)
class SecondOrder:
    """Count, mean [p] and scatter about the mean [p, p] of a set of vectors, in float64."""

    count: float
    mean: Tensor
    scatter: Tensor

    @property
    def covariance(self) -> Tensor:
        """Scatter / n `[p, p]`, so that `second_moment` minus `covariance` is exactly mean meanᵀ."""
        return self.scatter / self.count

    @property
    def second_moment(self) -> Tensor:
        """Second moment about zero, E[x xᵀ] `[p, p]`."""
        return self.covariance + torch.outer(self.mean, self.mean)


def add_gram(out: Tensor, x: Tensor) -> None:
    """Add xᵀx to `out` in place, for each block; of the lower triangle only a part is computed.

    Args:
        out: [blocks, p, p], float64. Only its upper triangle is valid afterwards.
        x: Vectors [n, blocks, p].
    """
    x = x.transpose(0, 1)
    width = x.shape[-1]
    for start in range(0, width, _PANEL):
        stop = min(start + _PANEL, width)
        out[:, start:stop, start:] += x[..., start:stop].mT @ x[..., start:]


def symmetric(upper: Tensor) -> Tensor:
    """Return the symmetric matrix [p, p] with the given upper triangle."""
    return upper.triu() + upper.triu(1).mT


def add_outer(out: Tensor, factor: float, x: Tensor) -> None:
    """Add factor · x xᵀ to `out` in place, for each block.

    Args:
        out: [blocks, p, p] or [p, p].
        factor: Weight of the outer product.
        x: One vector for each block, [blocks, p] or [p].
    """
    out, x = out if out.ndim == 3 else out[None], x if x.ndim == 2 else x[None]
    out.baddbmm_(x.unsqueeze(-1), x.unsqueeze(-2), alpha=factor)


def _combine(count: float, mean: Tensor, scatter: Tensor, n: float, shift: Tensor, more: Tensor | None) -> None:
    """Add in place n vectors with mean `mean + shift` and scatter `more` about their mean (None: already added)."""
    total = count + n
    if more is not None:
        scatter += more
    add_outer(scatter, count * n / total, shift)
    mean += (n / total) * shift


class Moments:
    """Streaming moments of `blocks` sets of vectors for each fold, and the scatter of the sequence means.

    Of `scatter` and `between` only the upper triangle is valid; `total` and `between_sequences` return symmetric matrices.

    Args:
        width: Dimension of a vector.
        blocks: Number of sets of vectors (layers, heads or kinds) that are accumulated together.
        folds: Number of disjoint groups of sequences.
        device: Device of the sums.

    Attributes:
        dimensions: Dimension of the vectors; more than `width` where that is the dimension of their span.
        count: Vectors per fold [folds], float64.
        mean: Mean of every fold [folds, blocks, width].
        scatter: Scatter about the mean of the fold [folds, blocks, width, width].
        between: Σ_s n_s (m_s − m)(m_s − m)ᵀ over sequences s [blocks, width, width].
        sequences: Number of sequences.
        precision: ε of the coarsest dtype used in products: eigenvalues below ε λ₁ are rounding noise.
    """

    def __init__(self, width: int, *, blocks: int = 1, folds: int = 1, device: str | torch.device = "cpu") -> None:
        options = {"dtype": torch.float64, "device": device}
        self.width, self.blocks, self.folds = width, blocks, folds
        self.dimensions = width
        self.count = torch.zeros(folds, dtype=torch.float64)
        self.mean = torch.zeros(folds, blocks, width, **options)
        self.scatter = torch.zeros(folds, blocks, width, width, **options)
        self.between = torch.zeros(blocks, width, width, **options)
        self._total_mean = torch.zeros(blocks, width, **options)
        self.sequences = 0
        self.precision = 0.0

    @staticmethod
    def nbytes(width: int, blocks: int = 1, folds: int = 1) -> int:
        """Return the bytes of a `Moments` of this size."""
        return 8 * blocks * (width * width * (folds + 1) + width * (folds + 1))

    def update(self, vectors: Tensor, lengths: Sequence[int] | None = None, fold: int = 0) -> None:
        """Add whole sequences to one fold.

        Args:
            vectors: [n, blocks, width], sequence after sequence.
            lengths: Length of every sequence, n in total; default: one sequence.
            fold: Index of the fold.

        Raises:
            StatisticsError: The shape of `vectors` or the sum of `lengths` is wrong.
        """
        lengths = list(lengths or [len(vectors)])
        if vectors.shape[1:] != (self.blocks, self.width) or sum(lengths) != len(vectors) or min(lengths) < 1:
            raise StatisticsError(
                f"vectors of shape {tuple(vectors.shape)} with sequence lengths {lengths}: expected "
                f"[n, {self.blocks}, {self.width}] and positive lengths that add up to n"
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
        """Add the moments of another part, fold by fold; the result equals one pass over both parts.

        Raises:
            StatisticsError: `other` has another width, number of blocks or number of folds.
        """
        if (self.width, self.blocks, self.folds) != (other.width, other.blocks, other.folds):
            shapes = (f"{m.folds} folds × {m.blocks} blocks × width {m.width}" for m in (self, other))
            raise StatisticsError(f"moments of different shapes cannot be merged: {' and '.join(shapes)}")
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
        """Return the moments of dimensions start:stop of one block as a view, for example of one head of a layer."""
        view = object.__new__(Moments)
        columns = slice(start, self.width if stop is None else stop)
        view.blocks, view.folds, view.count, view.sequences = 1, self.folds, self.count, self.sequences
        view.mean = self.mean[:, block : block + 1, columns]
        view.scatter = self.scatter[:, block : block + 1, columns, columns]
        view.between = self.between[block : block + 1, columns, columns]
        view._total_mean = self._total_mean[block : block + 1, columns]
        view.width = view.dimensions = view.mean.shape[-1]
        view.precision = self.precision
        return view

    def total(self, block: int = 0, folds: Sequence[int] | None = None) -> SecondOrder:
        """Return count, mean and scatter of one block over the given folds; default: all.

        Raises:
            StatisticsError: The folds contain no vectors.
        """
        chosen = [f for f in (range(self.folds) if folds is None else folds) if self.count[f]]
        if not chosen:
            raise StatisticsError("the moments contain no vectors: the text is empty or was not captured")
        mean, scatter = self.mean[chosen[0], block].clone(), self.scatter[chosen[0], block].clone()
        count = float(self.count[chosen[0]])
        for fold in chosen[1:]:
            n = float(self.count[fold])
            _combine(count, mean, scatter, n, self.mean[fold, block] - mean, self.scatter[fold, block])
            count += n
        return SecondOrder(count, mean, symmetric(scatter))

    def raw(self, total: SecondOrder) -> tuple[Tensor, Tensor]:
        """Return the variances about the mean and the mean squares of the raw dimensions, each [dimensions].

        Args:
            total: Moments of one block over all folds.
        """
        return total.covariance.diagonal(), total.second_moment.diagonal()

    def between_sequences(self, block: int = 0) -> Tensor:
        """Return the scatter [p, p] of the sequence means about the total mean, weighted by sequence length."""
        return symmetric(self.between[block])
