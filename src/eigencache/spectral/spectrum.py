"""The statistics of THEORY 3 as functions of eigenvalues; each agrees with its formula in NumPy float64.

`eigenvalues` are descending and non-negative, [p] or [..., p] where a docstring says so.
"""

import math

import numpy as np
import torch
from torch import Tensor


def eigenvalues_of(matrix: Tensor) -> Tensor:
    """Eigenvalues of a symmetric positive matrix [p, p], descending, rounding below zero cut to zero."""
    return torch.linalg.eigvalsh(matrix).flip(-1).clamp_min(0)


def eigenbasis_of(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues descending [p] and eigenvectors [p, p] in the same order, as columns."""
    values, vectors = torch.linalg.eigh(matrix)
    return values.flip(-1).clamp_min(0), vectors.flip(-1)


def energy_shares(eigenvalues: Tensor) -> Tensor:
    """energy@k for k = 1 … p: Σ_{i≤k} λ_i / Σ λ, [..., p]; of an all-zero spectrum nothing is known: NaN."""
    return eigenvalues.cumsum(-1) / eigenvalues.sum(-1, keepdim=True)


def energy_points(width: int) -> list[int]:
    """The k at which energy is recorded: 1, 2, 4, … and p itself."""
    return [1 << i for i in range(width.bit_length()) if 1 << i < width] + [width]


def rank_at(eigenvalues: Tensor, share: float) -> Tensor:
    """The least r with energy@r ≥ share, [...] integers; rounding of the last bit does not add a rank."""
    return (energy_shares(eigenvalues) < share * (1 - 1e-12)).sum(-1) + 1


def _exp_entropy(weights: Tensor) -> Tensor:
    shares = weights / weights.sum(-1, keepdim=True)
    return torch.special.entr(shares).sum(-1).exp()


def effective_rank(eigenvalues: Tensor) -> Tensor:
    """exp(−Σ p ln p) with p = σ/Σσ, σ = √λ, [...]: the effective rank of Roy & Vetterli (2007)."""
    return _exp_entropy(eigenvalues.sqrt())


def effective_rank_eigen(eigenvalues: Tensor) -> Tensor:
    """exp(−Σ p ln p) with p = λ/Σλ, [...]: never more than `effective_rank`."""
    return _exp_entropy(eigenvalues)


def participation_ratio(eigenvalues: Tensor) -> Tensor:
    """(Σλ)² / Σλ², [...]: r equal eigenvalues give r."""
    return eigenvalues.sum(-1).square() / eigenvalues.square().sum(-1)


def stable_rank(eigenvalues: Tensor) -> Tensor:
    """Σλ / λ₁, [...]."""
    return eigenvalues.sum(-1) / eigenvalues[..., 0]


def condition_number(eigenvalues: Tensor, precision: float = 0.0) -> float:
    """√(λ₁/λ_p); infinite where the last eigenvalue is zero or rounding noise.

    Noise is what lies below p ε λ₁ of the decomposition's own ε, or below `precision` · λ₁ of the products before it.
    """
    floor = eigenvalues[0] * max(len(eigenvalues) * torch.finfo(eigenvalues.dtype).eps, precision)
    return math.sqrt(eigenvalues[0] / eigenvalues[-1]) if eigenvalues[-1] > floor else math.inf


def _ratio(high: Tensor, low: Tensor) -> Tensor:
    return torch.where(low > 0, high / low, math.inf)


def spread(variances: Tensor) -> Tensor:
    """max std / min std over raw dimensions, [...]; infinite where a dimension never varies."""
    return _ratio(variances.amax(-1), variances.amin(-1)).sqrt()


def spread_p95_p5(variances: Tensor) -> Tensor:
    """95th / 5th percentile of the std over raw dimensions, [...]: the spread without its two extremes."""
    low, high = torch.quantile(variances.sqrt(), torch.tensor([0.05, 0.95], dtype=variances.dtype), dim=-1)
    return _ratio(high, low)


def marchenko_pastur(variance: float, aspect: float, count: int) -> tuple[float, np.ndarray]:
    """Upper edge s²(1+√γ)² and `count` expected eigenvalues, descending, of white noise with γ = p / n_eff.

    Marchenko & Pastur 1967. Above γ = 1 the share 1 − 1/γ of the eigenvalues is zero. An eigenvalue of real data
    tells of a direction only above the edge (Baik, Ben Arous & Péché 2005).
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
    """Cosines of the principal angles between the spans of two orthonormal bases [p, r]: 1 for the same subspace."""
    return torch.linalg.svdvals(basis.mT @ other).clamp(max=1)
