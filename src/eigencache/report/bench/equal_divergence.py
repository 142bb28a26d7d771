"""Tables of the rate that each method needs for a given KL to the uncompressed model.

Equal KL needs fewer scored tokens than equal ΔNLL, and an error that happens to help cannot make it negative.
"""

from collections.abc import Sequence
from math import exp, fsum, inf, log
from typing import NamedTuple

import numpy as np

from eigencache.records.base import Interval
from eigencache.records.bench import BenchRecord
from eigencache.records.frontier import bits_at_loss, median_of
from eigencache.report.bench.equal_loss import RELATIVE_NOTE
from eigencache.report.bench.points import SIDE_INFORMATION, SIDE_INFORMATION_NOTE, side_information_cells
from eigencache.report.core.measured import ABSENT
from eigencache.report.core.table import Table

DIVERGENCES = (0.003, 0.01, 0.03, 0.1)  # nats per token


class Rate(NamedTuple):
    """Bits per value of a method at a given KL."""

    sign: str  # empty; `<` or `>` for the lowest or highest rate tested; `—` for a method without points
    bits: float  # infinity for a method without points
    interval: Interval | None = None  # 95 %


def divergence_rate(record: BenchRecord, method: str, context: int, kl: float) -> Rate:
    """Return the rate of a method at a given KL to the uncompressed model.

    The interval ends where the curves through the ends of the points' KL intervals cross `kl`. All points are scored on the
    same sequences, so their KL rises and falls together.

    Args:
        record: The bench of one model.
        method: Name of the method.
        context: Context length, a key of `record.corpora`.
        kl: Nats per token.

    Returns:
        The geometric mean over seeds, with the mean of the intervals' ends; the median if some seeds have no crossing; the
        lowest or highest rate tested if the median has none.
    """
    by_seed: list[float | None] = []
    bounds: tuple[list[float | None], ...] = ([], [])  # of the intervals, by seed
    ends: list[Rate] = []
    for seed in sorted({p.seed for p in record.points if p.method == method and p.context == context}):
        points = [p for p in record.points if (p.method, p.context, p.seed) == (method, context, seed)]
        bits, losses = np.array([p.bits_per_value for p in points]), np.array([p.quality.kl for p in points])
        ends.append(Rate("<", float(bits.min())) if losses[bits.argmin()] <= kl else Rate(">", float(bits.max())))
        by_seed.append(bits_at_loss(bits, losses, kl))
        intervals = [p.quality.kl_interval for p in points if p.quality.kl_interval is not None]
        for end, crossings in enumerate(bounds):
            known = len(intervals) == len(points)
            crossings.append(bits_at_loss(bits, np.array([both[end] for both in intervals]), kl) if known else None)
    median = median_of(by_seed)[0]
    if median is None:
        return next((end for end, bits in zip(ends, by_seed, strict=True) if bits is None), Rate(ABSENT, inf))
    if (mean := _geometric_mean(by_seed)) is None:
        return Rate("", median)
    low, high = map(_geometric_mean, bounds)
    return Rate("", mean, None if low is None or high is None else (low, high))


def _geometric_mean(values: Sequence[float | None]) -> float | None:
    """Return the geometric mean; None if a value is missing."""
    logs = [log(value) for value in values if value is not None]
    return exp(fsum(logs) / len(logs)) if len(logs) == len(values) else None


def divergences_table(record: BenchRecord, context: int) -> Table:
    """Return the rate and the ratio of every method at each KL, lowest rate first, unsupported methods last.

    Args:
        record: The bench of one model.
        context: Context length, a key of `record.corpora`.
    """
    columns = (
        "Method",
        *(f"Bits at KL {kl:g}" for kl in DIVERGENCES),
        *(f"Ratio at {kl:g}" for kl in DIVERGENCES),
        *SIDE_INFORMATION,
    )
    methods = dict.fromkeys(p.method for p in record.points if p.context == context)
    rates = {method: [divergence_rate(record, method, context, kl) for kl in DIVERGENCES] for method in methods}
    order = sorted(
        rates, key=lambda method: [inf if r.sign == ">" else r.bits for r in (rates[method][i] for i in (2, 1, 3, 0))]
    )
    rows = [
        (
            method,
            *map(_cell, rates[method]),
            *(ABSENT if rate.sign else f"{16 / rate.bits:.1f} x" for rate in rates[method]),
            *side_information_cells(record, method, context),
        )
        for method in order
    ]
    rows += [(method, *(ABSENT for _ in columns[1:])) for method in record.refused]
    notes = (
        "KL(uncompressed ‖ compressed) in nats per token, over the scored tokens. "
        "Intervals: 95 %, bootstrap over sequences. "
        '"<": even the lowest rate tested diverges less. ">": even the highest rate tested misses the target. '
        "Ratio = bytes of the 16-bit cache / bytes of the compressed cache. " + SIDE_INFORMATION_NOTE,
    )
    title = f"{record.model.name}, context {context:,} tokens: bits per value at equal KL"
    return Table(title, columns, tuple(rows), notes=notes)


def against_by_divergence_table(records: Sequence[BenchRecord], method: str) -> Table:
    """Return the rate of each method at equal KL divided by the rate of `method`, one column per model and KL.

    Args:
        records: The benches of several models.
        method: The method to divide by.
    """
    places = [(record, context, kl) for record in records for context in record.corpora for kl in DIVERGENCES]
    columns = ("Method", *(f"{record.model.name} {context:,} at {kl:g}" for record, context, kl in places))
    names = dict.fromkeys(p.method for record in records for p in record.points if p.method != method)
    rows = []
    for name in names:
        cells = []
        for record, context, kl in places:
            reference, other = (divergence_rate(record, m, context, kl) for m in (method, name))
            unknown = reference.sign or other.sign == "<"
            cells.append(ABSENT if unknown else other.sign or f"{other.bits / reference.bits:.2f}")
        rows.append((name, *cells))
    notes = (f"Bits per value of each method / bits per value of {method}, at the same KL. {RELATIVE_NOTE}",)
    return Table(f"Bits at equal KL, relative to {method}", columns, tuple(rows), notes=notes)


def _cell(rate: Rate) -> str:
    """Return `2.52 [2.41, 2.63]`, `< 0.8`, `> 8`, or `—`."""
    interval = "" if rate.interval is None else f"[{rate.interval[0]:.3g}, {rate.interval[1]:.3g}]"
    return " ".join(filter(None, (rate.sign, f"{rate.bits:.3g}", interval)))
