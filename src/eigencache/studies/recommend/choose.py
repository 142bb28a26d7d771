"""Choose the largest compression ratio whose confidence interval of ΔNLL lies wholly within the loss budget.

The upper end of the interval decides, because among many noisy estimates the smallest is biased towards zero.
"""

from collections.abc import Iterable, Sequence
from typing import TypeVar

from eigencache.records.advice import Budget, Candidate, Measured
from eigencache.records.quality import SweepRecord

_M = TypeVar("_M", bound=Measured)


def candidates_of(record: SweepRecord) -> list[Candidate]:
    """Return every point of a sweep as a candidate, without random bases, which are controls."""
    rotated = record.model.geometry.rope is not None
    return [
        Candidate.of(series, point, rotated)
        for series in record.series
        if series.basis != "random"
        for point in series.points
    ]


def within(candidates: Iterable[_M], budget: Budget) -> list[_M]:
    """Return the candidates that save bytes and whose upper interval end is within the budget, largest ratio first."""
    fit = [c for c in candidates if c.upper_nats <= budget.nats and c.choosing.compression_ratio > 1]
    return sorted(fit, key=lambda c: (-c.choosing.compression_ratio, c.upper_nats))


def best_per_target(candidates: Sequence[Candidate], budget: Budget) -> list[Candidate]:
    """Return the candidate with the largest ratio within the budget for every target; the first one is the choice."""
    best: dict[str, Candidate] = {}
    for candidate in within(candidates, budget):
        best.setdefault(candidate.target, candidate)
    return list(best.values())


def nearest(candidates: Iterable[_M]) -> _M | None:
    """Return the candidate that saves bytes with the lowest upper interval end, or estimate if there is no interval."""
    saving = [c for c in candidates if c.choosing.compression_ratio > 1]
    return min(saving, key=lambda c: (c.upper_nats, c.choosing.delta_nll), default=None)
