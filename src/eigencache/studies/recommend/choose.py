"""The choice within a budget: the largest ratio among those whose interval lies within it as a whole.

The upper end of the interval decides, not the estimate: of many noisy estimates the luckiest would win.
"""

from collections.abc import Iterable, Sequence

from eigencache.records.advice import Budget, Candidate
from eigencache.records.quality import SweepRecord


def candidates_of(record: SweepRecord) -> list[Candidate]:
    """Every point of a sweep that could be chosen: random bases are controls."""
    rotated = record.model.geometry.rope is not None
    return [
        Candidate.of(series, point, rotated)
        for series in record.series
        if series.basis != "random"
        for point in series.points
    ]


def within(candidates: Iterable[Candidate], budget: Budget) -> list[Candidate]:
    """Those whose upper interval end is within the budget and that save bytes, the largest ratio first."""
    fit = [c for c in candidates if c.upper_nats <= budget.nats and c.choosing.compression_ratio > 1]
    return sorted(fit, key=lambda c: (-c.choosing.compression_ratio, c.upper_nats))


def best_per_target(candidates: Sequence[Candidate], budget: Budget) -> list[Candidate]:
    """The largest ratio of every target within the budget, the largest of all first: that one is chosen."""
    best: dict[str, Candidate] = {}
    for candidate in within(candidates, budget):
        best.setdefault(candidate.target, candidate)
    return list(best.values())


def nearest(candidates: Iterable[Candidate]) -> Candidate | None:
    """The lowest upper interval end of all that save bytes; by the estimate where there are no intervals."""
    saving = [c for c in candidates if c.choosing.compression_ratio > 1]
    return min(saving, key=lambda c: (c.upper_nats, c.choosing.delta_nll), default=None)
