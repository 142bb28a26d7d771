"""Statistics of a spectrum as functions of its eigenvalues (THEORY 3).

`eigenvalues` are descending and non-negative: [..., p], with the leading dimensions [...] in the result, unless a docstring
says [p].
"""

import math
from collections.abc import Iterable
from itertools import chain

import numpy as np
import torch
from torch import Tensor

FLOAT32 = torch.finfo(torch.float32).eps  # rounding of the dtype in which bases are stored and coefficients are computed


def eigenvalues_of(matrix: Tensor) -> Tensor:
    """Return the eigenvalues [p] of a symmetric positive matrix [p, p], descending, with negative rounding set to zero."""
    return torch.linalg.eigvalsh(matrix).flip(-1).clamp_min(0)


def eigenbasis_of(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return the eigenvalues [p], descending, and the eigenvectors [p, p] as columns, of a symmetric matrix [p, p]."""
    values, vectors = torch.linalg.eigh(matrix)
    return values.flip(-1).clamp_min(0), vectors.flip(-1)


def energy_shares(eigenvalues: Tensor) -> Tensor:
    """Return energy@k = Σ_{i≤k} λ_i / Σ λ for k = 1 … p, [..., p]; NaN for an all-zero spectrum."""
    return eigenvalues.cumsum(-1) / eigenvalues.sum(-1, keepdim=True)


def energy_points(width: int) -> list[int]:
    """Return the ranks at which energy is recorded: 1, 2, 4, … and p = `width`."""
    return [1 << i for i in range(width.bit_length()) if 1 << i < width] + [width]


def rank_at(eigenvalues: Tensor, share: float) -> Tensor:
    """Return the smallest r with energy@r ≥ `share`, [...] integers; a relative tolerance of 1e-12 absorbs rounding."""
    return (energy_shares(eigenvalues) < share * (1 - 1e-12)).sum(-1) + 1


def _exp_entropy(weights: Tensor) -> Tensor:
    shares = weights / weights.sum(-1, keepdim=True)
    return torch.special.entr(shares).sum(-1).exp()


def effective_rank(eigenvalues: Tensor) -> Tensor:
    """Return exp(−Σ p ln p) with p = σ/Σσ and σ = √λ, [...]: the effective rank of Roy & Vetterli (2007)."""
    return _exp_entropy(eigenvalues.sqrt())


def effective_rank_eigen(eigenvalues: Tensor) -> Tensor:
    """Return exp(−Σ p ln p) with p = λ/Σλ, [...]; never larger than `effective_rank`."""
    return _exp_entropy(eigenvalues)


def participation_ratio(eigenvalues: Tensor) -> Tensor:
    """Return (Σλ)² / Σλ², [...]; r for r equal eigenvalues."""
    return eigenvalues.sum(-1).square() / eigenvalues.square().sum(-1)


def stable_rank(eigenvalues: Tensor) -> Tensor:
    """Return Σλ / λ₁, [...]."""
    return eigenvalues.sum(-1) / eigenvalues[..., 0]


def condition_number(eigenvalues: Tensor, precision: float = 0.0) -> float:
    """Return √(λ₁/λ_p); infinite where the last eigenvalue is zero or rounding noise.

    Args:
        eigenvalues: [p]. Rounding noise of the decomposition is below p ε λ₁, with ε of their dtype.
        precision: ε of the products from which the matrix was computed; their noise is below `precision` · λ₁.
    """
    floor = eigenvalues[0] * max(len(eigenvalues) * torch.finfo(eigenvalues.dtype).eps, precision)
    return math.sqrt(eigenvalues[0] / eigenvalues[-1]) if eigenvalues[-1] > floor else math.inf


def dead_dimensions(variances: Tensor, mean_squares: Tensor, precision: float = FLOAT32) -> Tensor:
    """Return which raw dimensions never vary, or vary by no more than rounding [p] bool.

    A dimension is dead if its standard deviation is at most ε times the largest root mean square of all dimensions. A sum
    of products with all dimensions then rounds to the same number with a constant in its place.

    Args:
        variances: Variances of the raw dimensions [p]: about the mean, or about zero for uncentered statistics.
        mean_squares: Mean squares of the raw dimensions [p].
        precision: ε of the coarsest dtype in which the vectors are multiplied.
    """
    return variances <= precision**2 * mean_squares.amax()


def variances_and_mean_squares(parts: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """Return variances and mean squares [p] in float64; the variance of a constant is exactly zero.

    Args:
        parts: Vectors [n, p], some at a time, at least one.
    """
    parts = iter(parts)
    part = next(parts)
    first, count = part[0].clone(), 0
    total, squares = torch.zeros_like(first, dtype=torch.float64), torch.zeros_like(first, dtype=torch.float64)
    for x in chain((part,), parts):
        offsets = (x - first).double()  # exactly zero for a constant
        count += len(x)
        total += offsets.sum(0)
        squares += offsets.square_().sum(0)
    variances = (squares / count - (total / count).square()).clamp_min(0)
    return variances, variances + (first.double() + total / count).square()


def _ratio(high: Tensor, low: Tensor) -> Tensor:
    return torch.where(low > 0, high / low, math.inf)


def spread(variances: Tensor) -> Tensor:
    """Return max std / min std over the raw dimensions, [...]; infinite where a dimension has zero variance.

    Args:
        variances: Variances of the raw dimensions [..., p].
    """
    return _ratio(variances.amax(-1), variances.amin(-1)).sqrt()


def spread_p95_p5(variances: Tensor) -> Tensor:
    """Return the ratio of the 95th to the 5th percentile of std over the raw dimensions, [...]; arguments as `spread`."""
    low, high = torch.quantile(variances.sqrt(), torch.tensor([0.05, 0.95], dtype=variances.dtype), dim=-1)
    return _ratio(high, low)


def marchenko_pastur(variance: float, aspect: float, count: int) -> tuple[float, np.ndarray]:
    """Return the upper edge s²(1+√γ)² and the expected eigenvalues of white noise (Marchenko & Pastur 1967).

    For γ > 1 the share 1 − 1/γ of the eigenvalues is zero. An eigenvalue of real data is evidence of a direction only if
    it exceeds the edge (Baik, Ben Arous & Péché 2005).

    Args:
        variance: s², the variance of each dimension.
        aspect: γ = p / n_eff.
        count: Number of expected eigenvalues to return.

    Returns:
        The edge, and the expected eigenvalues [count], descending.
    """
    low, high = variance * (1 - math.sqrt(aspect)) ** 2, variance * (1 + math.sqrt(aspect)) ** 2
    angle = np.linspace(0, np.pi, 4097)  # x = center − radius cos(angle) resolves both edges
    x = (low + high) / 2 - (high - low) / 2 * np.cos(angle)
    density = np.sqrt(np.maximum((high - x) * (x - low), 0)) * np.sin(angle)
    density[1:] /= x[1:]
    density[0] = density[0] / x[0] if x[0] > 0 else density[1]
    cumulative = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2)])
    zeros = max(0.0, 1 - 1 / aspect)
    cumulative = zeros + (1 - zeros) * cumulative / cumulative[-1]
    share = (np.arange(count) + 0.5) / count
    values = np.where(share < zeros, 0.0, np.interp(share, cumulative, x))
    return high, values[::-1].copy()


def principal_cosines(basis: Tensor, other: Tensor) -> Tensor:
    """Return the cosines [r] of the principal angles between two subspaces; 1 for equal subspaces.

    Args:
        basis: Orthonormal basis [p, r].
        other: Orthonormal basis [p, r].
    """
    return torch.linalg.svdvals(basis.mT @ other).clamp(max=1)
