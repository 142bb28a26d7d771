"""Computation of a `Spectrum` record from moments: all statistics of THEORY 3, withheld where the sample is too small.

Rules (THEORY 3.1): support is min(n_eff, distinct contexts) / p. Ranks are withheld below a support of 1 and marked with a
warning below 10. Statistics of the tail (rank at 99 %, condition number) are withheld below 10 and marked below 50.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from eigencache.records.base import Interval, Scope
from eigencache.records.probe import Spectrum
from eigencache.spectral import spectrum as sp
from eigencache.spectral.moments import Moments, SecondOrder

REFUSED_BELOW, DOUBTFUL_BELOW, TAIL_DOUBTFUL_BELOW = 1, 10, 50
MIN_SEQUENCES = 8  # for an estimate of the variance of sequence means
MIN_FOLDS = 8  # for a bootstrap
LEADING = 8  # directions whose autocorrelation is measured
REPLICATES = 500
NULL_POINTS = 256
WIDE = 512  # above this width, held-out energies and intervals are computed in float32


@dataclass(frozen=True)
class Place:
    """Identification of a spectrum: layer and head (None: all), kind and frame of the vectors, and scope."""

    layer_idx: int | None
    head: int | None
    kind: str
    frame: str
    scope: Scope


def effective_vectors(moments: Moments, total: SecondOrder, basis: Tensor, eigenvalues: Tensor) -> float | None:
    """Return the effective sample size n_eff = n / (1 + 2Σρ_k), estimated by batch means over sequences.

    The variance of the sequence means, divided by that of means of independent vectors, is 1 + 2Σ(1 − k/T)ρ_k (Flegal &
    Jones 2010). It is averaged over the 8 leading directions, weighted by eigenvalue, and never below 1.

    Args:
        moments: Moments of one block; supplies the scatter of the sequence means.
        total: Count of all folds of `moments`.
        basis: Eigenvectors of the covariance [p, p], as columns.
        eigenvalues: Eigenvalues of the covariance [p], descending.

    Returns:
        The effective number of vectors; None for fewer than 8 sequences or a zero covariance.
    """
    if moments.sequences < MIN_SEQUENCES or eigenvalues[0] <= 0:
        return None
    basis, eigenvalues = basis[:, :LEADING], eigenvalues[:LEADING]
    between = (basis * (moments.between_sequences() @ basis)).sum(0) / (moments.sequences - 1)
    time = float(between.sum() / eigenvalues.sum())
    return total.count / max(1.0, time)


@dataclass(frozen=True)
class _Decomposed:
    """Decomposition of the covariance, used by both the centered and the uncentered spectrum."""

    total: SecondOrder
    eigenvalues: Tensor
    basis: Tensor
    n_eff: float | None


def _decomposed(moments: Moments, at_most: float | None) -> _Decomposed:
    total = moments.total()
    eigenvalues, basis = sp.eigenbasis_of(total.covariance)
    n_eff = effective_vectors(moments, total, basis, eigenvalues)
    return _Decomposed(total, eigenvalues, basis, min(n_eff, at_most) if n_eff and at_most else n_eff)


def measure_both(
    place: Place, moments: Moments, *, distinct_contexts: int, at_most: float | None = None, seed: int = 0
) -> tuple[Spectrum, Spectrum]:
    """Measure the centered and the uncentered spectrum of one place; the covariance is decomposed only once.

    Args:
        place: What the vectors are.
        moments: Moments of one block.
        distinct_contexts: Number of distinct contexts of the text (`corpora.contexts`).
        at_most: Upper bound of the effective sample size; None: no bound.
        seed: Seed of the bootstrap.

    Returns:
        The centered and the uncentered spectrum, each equal to the result of `measure`.
    """
    shared = _decomposed(moments, at_most)
    centered, uncentered = (_spectrum(place, moments, shared, c, distinct_contexts, seed) for c in (True, False))
    return centered, uncentered


def measure(
    place: Place, moments: Moments, *, centered: bool, distinct_contexts: int, at_most: float | None = None, seed: int = 0
) -> Spectrum:
    """Measure the spectrum of one place: statistics, support, refusals, warnings and intervals.

    Held-out energy, split-half agreement, the Marchenko–Pastur null and intervals are computed for the centered spectrum
    only.

    Args:
        place: What the vectors are.
        moments: Moments of one block.
        centered: Use the covariance (about the mean) if true, the second moment (about zero) otherwise.
        distinct_contexts: Number of distinct contexts of the text (`corpora.contexts`).
        at_most: Upper bound of the effective sample size; None: no bound.
        seed: Seed of the bootstrap.
    """
    return _spectrum(place, moments, _decomposed(moments, at_most), centered, distinct_contexts, seed)


def _spectrum(
    place: Place, moments: Moments, shared: _Decomposed, centered: bool, distinct_contexts: int, seed: int
) -> Spectrum:
    total, basis, n_eff = shared.total, shared.basis, shared.n_eff
    matrix = total.covariance if centered else total.second_moment
    eigenvalues = shared.eigenvalues if centered else sp.eigenvalues_of(matrix)
    width = moments.dimensions
    eigenvalues = _padded(eigenvalues, width)
    variances, squares = moments.raw(total)
    variances = variances if centered else squares
    support = min(n_eff or total.count, distinct_contexts) / width
    refusals, warnings = _verdicts(support, width, n_eff, distinct_contexts)
    dead = sp.dead_dimensions(variances, squares, moments.precision)
    constant = bool(dead.all())
    if constant:
        refusals.append("every vector is the same: there is no spectrum")
    rank_known, tail_known = support >= REFUSED_BELOW and not constant, support >= DOUBTFUL_BELOW and not constant
    rank_90 = int(sp.rank_at(eigenvalues, 0.90)) if rank_known else None
    points = [k - 1 for k in sp.energy_points(width)]
    shares = sp.energy_shares(eigenvalues)
    mean_norm = float(total.mean.norm())
    halves = _halves(moments) if centered and not constant else None
    edge = nulls = above = None
    if centered and n_eff:
        edge, nulls = sp.marchenko_pastur(float(eigenvalues.mean()), width / n_eff, min(width, NULL_POINTS))
        above = int((eigenvalues > edge).sum())
    intervals = _intervals(moments, total, basis, ~dead, halves, seed) if halves and rank_known else {}
    return Spectrum(
        **vars(place),
        centered=centered,
        width=width,
        vectors=int(total.count),
        effective_vectors=n_eff,
        distinct_contexts=distinct_contexts,
        support=support,
        eigenvalues=eigenvalues.tolist(),
        energy={k + 1: float(shares[k]) for k in points} if not constant else {},
        held_out_energy=_held_out(halves, points) if halves else None,
        rank_90=rank_90,
        rank_95=int(sp.rank_at(eigenvalues, 0.95)) if rank_known else None,
        rank_99=int(sp.rank_at(eigenvalues, 0.99)) if tail_known else None,
        effective_rank=float(sp.effective_rank(eigenvalues)) if rank_known else None,
        effective_rank_eigen=float(sp.effective_rank_eigen(eigenvalues)) if rank_known else None,
        participation_ratio=float(sp.participation_ratio(eigenvalues)) if rank_known else None,
        stable_rank=float(sp.stable_rank(eigenvalues)) if rank_known else None,
        condition_number=sp.condition_number(eigenvalues, moments.precision) if tail_known else None,
        mean_norm=mean_norm,
        mean_share=mean_norm**2 / max(float(total.second_moment.trace()), math.ulp(0.0)),
        spread=None if constant else float(sp.spread(variances[~dead])),
        spread_p95_p5=None if constant else float(sp.spread_p95_p5(variances[~dead])),
        dead=dead.nonzero().flatten().tolist(),
        null_edge=edge,
        null_eigenvalues=None if nulls is None else nulls.tolist(),
        above_null=above,
        split_half=_split_half(halves, rank_90) if halves and rank_90 else None,
        intervals=intervals,
        refusals=refusals,
        warnings=warnings,
    )


def _padded(eigenvalues: Tensor, width: int) -> Tensor:
    """Return eigenvalues [..., p] from those of the span of the vectors; the others are zero."""
    return torch.nn.functional.pad(eigenvalues, (0, width - eigenvalues.shape[-1]))


def _verdicts(support: float, width: int, n_eff: float | None, contexts: int) -> tuple[list[str], list[str]]:
    """Return refusals and warnings for a support, as sentences with figures."""
    have = f"{contexts:,} distinct contexts" if n_eff is None or contexts < n_eff else f"{n_eff:,.0f} effective vectors"
    behind = f"{have} for {width} dimensions"
    if support < REFUSED_BELOW:
        return [f"ranks refused: only {behind}"], []
    if support < DOUBTFUL_BELOW:
        return [f"rank at 99 % and condition number refused: {behind}"], [
            f"ranks doubtful: {behind}, 10 per dimension needed"
        ]
    if support < TAIL_DOUBTFUL_BELOW:
        return [], [f"tail doubtful: {behind}, 50 per dimension needed for rank at 99 % and condition number"]
    return [], []


@dataclass(frozen=True)
class _Half:
    """Moments of every other fold: number of vectors, covariance [p, p] and its eigenvectors as columns [p, p]."""

    count: float
    covariance: Tensor
    basis: Tensor


def _halves(moments: Moments) -> tuple[_Half, _Half] | None:
    """Return the even and the odd folds; None if either half has zero covariance."""
    folds = [f for f in range(moments.folds) if moments.count[f]]
    if len(folds) < 2:
        return None
    even, odd = (moments.total(folds=folds[first::2]) for first in (0, 1))
    if not even.covariance.any() or not odd.covariance.any():
        return None
    first, second = (_Half(t.count, t.covariance, sp.eigenbasis_of(_fast(t.covariance))[1]) for t in (even, odd))
    return first, second


def _fast(matrix: Tensor) -> Tensor:
    """Convert a matrix wider than `WIDE` to float32; return others unchanged."""
    return matrix.float() if matrix.shape[-1] > WIDE else matrix


def _along(matrix: Tensor, basis: Tensor) -> Tensor:
    """Return uᵀ M u for every column u of the basis, [p] float64; the product is computed in the dtype of the basis."""
    return (basis * (matrix.to(basis.dtype) @ basis)).sum(0, dtype=torch.float64).clamp_min(0)


def _held_out(halves: tuple[_Half, _Half], points: list[int]) -> dict[int, float]:
    """Return the energy of each half in the basis of the other, averaged, by number of directions.

    A half of n vectors has n − 1 directions about its mean, so higher ranks are left out, except all dimensions.
    """
    first, second = halves
    crossed = _along(first.covariance, second.basis), _along(second.covariance, first.basis)
    shares = sp.energy_shares(torch.stack(crossed)).mean(0)
    most = min(half.count for half in halves) - 1
    return {k + 1: float(shares[min(k, len(shares) - 1)]) for k in points if k < most or k == points[-1]}


def _split_half(halves: tuple[_Half, _Half], rank: int) -> float:
    """Return the mean squared cosine of the principal angles between the leading subspaces of the halves."""
    first, second = (half.basis[:, :rank] for half in halves)
    return float(sp.principal_cosines(first, second).square().mean())


def _statistics(values: Tensor, variances: Tensor) -> dict[str, Tensor]:
    """Return the statistics that have an interval, from eigenvalues [..., p] and the raw variances of live dimensions."""
    shares = sp.energy_shares(values)
    return {
        "effective_rank": sp.effective_rank(values),
        "effective_rank_eigen": sp.effective_rank_eigen(values),
        "participation_ratio": sp.participation_ratio(values),
        "stable_rank": sp.stable_rank(values),
        "rank_90": sp.rank_at(values, 0.90).double(),
        "rank_95": sp.rank_at(values, 0.95).double(),
        "spread": sp.spread(variances),
        **{f"energy@{k}": shares[..., k - 1] for k in sp.energy_points(values.shape[-1])},
    }


def _intervals(
    moments: Moments, total: SecondOrder, basis: Tensor, live: Tensor, halves: tuple[_Half, _Half], seed: int
) -> dict[str, Interval]:
    """Return 95 % intervals by a bootstrap over folds (groups of whole sequences); the spread is that of dimensions `live`.

    λ_i of a resample is u_iᵀ C* u_i in the basis of all data (first-order perturbation). Decomposing each resample again
    would bias every rank downward, because a resample repeats some folds and omits others. The estimate from all data has
    a finite-sample bias of about the difference between the halves and the whole (Quenouille 1956): an interval covers
    both the plain and the bias-corrected estimate. It does not cover the energy at a rank that separates equal true
    eigenvalues, because that bias decreases only with the square root of the number of vectors.
    """
    folds = [f for f in range(moments.folds) if moments.count[f]]
    if len(folds) < MIN_FOLDS:
        return {}
    counts = moments.count[folds]
    means = (moments.mean[folds, 0] - total.mean).cpu()
    scatters = (moments.total(folds=[fold]).scatter for fold in folds)
    fast = _fast(basis)
    along, raw = map(torch.stack, zip(*((_along(s, fast), s.diagonal()[live]) for s in scatters), strict=True))
    along, raw = along.cpu(), raw.cpu()
    draws = np.random.default_rng(seed).multinomial(len(folds), [1 / len(folds)] * len(folds), REPLICATES)
    weights = torch.from_numpy(draws).to(torch.float64)
    n = (weights @ counts)[:, None]

    def resampled(scatters: Tensor, offsets: Tensor) -> Tensor:
        """Return the variances of every resample about its own mean, by direction [replicates, p]."""
        second = weights @ (scatters + counts[:, None] * offsets.square())
        mean = weights @ (counts[:, None] * offsets) / n
        return (second / n - mean.square()).clamp_min(0)

    values = resampled(along, means @ basis.cpu()).sort(-1, descending=True).values
    samples = _statistics(values, resampled(raw, means[:, live.cpu()]))
    matrices = (total.covariance, fast), *((half.covariance, half.basis) for half in halves)
    whole, *parts = (_statistics(_along(m, b), m.diagonal()[live]) for m, b in matrices)
    ends, intervals = torch.tensor([0.025, 0.975], dtype=torch.float64), {}
    for name, sample in samples.items():
        bias = float(sum(part[name] for part in parts) / len(parts) - whole[name])
        if sample.isfinite().all() and math.isfinite(bias):
            low, high = torch.quantile(sample, ends).tolist()
            intervals[name] = min(low, low - bias), max(high, high - bias)
    return intervals
