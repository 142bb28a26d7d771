"""Tables of the rate that each method needs for a given KL to the uncompressed model.

Equal KL needs fewer scored tokens than equal ΔNLL, and an error that happens to help cannot make it negative.
"""

from collections.abc import Sequence
from math import exp, fsum, inf, log

import numpy as np

from eigencache.records.bench import BenchRecord
from eigencache.records.frontier import bits_at_loss, median_of
from eigencache.report.bench.equal_loss import RELATIVE_NOTE
from eigencache.report.bench.points import SIDE_INFORMATION, SIDE_INFORMATION_NOTE, side_information_cells
from eigencache.report.core.measured import ABSENT
from eigencache.report.core.table import Table

DIVERGENCES = (0.003, 0.01, 0.03, 0.1)  # nats per token


def divergence_bits(record: BenchRecord, method: str, context: int, kl: float) -> tuple[str, float]:
    """Return the rate of a method at a given KL to the uncompressed model.

    Args:
        record: The bench of one model.
        method: Name of the method.
        context: Context length, a key of `record.corpora`.
        kl: Nats per token.

    Returns:
        An empty string and the geometric mean over seeds, or the median if some seeds have no crossing; `<` and the
        lowest rate tested, `>` and the highest, if the median has none; `—` and infinity for a method without points.
    """
    by_seed: list[float | None] = []
    ends: list[tuple[str, float]] = []
    for seed in sorted({p.seed for p in record.points if p.method == method and p.context == context}):
        points = [p for p in record.points if (p.method, p.context, p.seed) == (method, context, seed)]
        bits, losses = np.array([p.bits_per_value for p in points]), np.array([p.quality.kl for p in points])
        ends.append(("<", float(bits.min())) if losses[bits.argmin()] <= kl else (">", float(bits.max())))
        by_seed.append(bits_at_loss(bits, losses, kl))
    median = median_of(by_seed)[0]
    if median is None:
        return next((end for end, bits in zip(ends, by_seed, strict=True) if bits is None), (ABSENT, inf))
    crossings = [bits for bits in by_seed if bits is not None]
    return "", exp(fsum(map(log, crossings)) / len(crossings)) if len(crossings) == len(by_seed) else median


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
    rates = {method: [divergence_bits(record, method, context, kl) for kl in DIVERGENCES] for method in methods}
    order = sorted(
        rates, key=lambda method: [inf if sign == ">" else bits for sign, bits in (rates[method][i] for i in (2, 1, 3, 0))]
    )
    rows = [
        (
            method,
            *(f"{sign} {bits:.3g}".strip() for sign, bits in rates[method]),
            *(ABSENT if sign else f"{16 / bits:.1f} x" for sign, bits in rates[method]),
            *side_information_cells(record, method, context),
        )
        for method in order
    ]
    rows += [(method, *(ABSENT for _ in columns[1:])) for method in record.refused]
    notes = (
        "KL(uncompressed ‖ compressed) in nats per token, over the scored tokens. "
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
            (unknown, reference), (sign, other) = (divergence_bits(record, m, context, kl) for m in (method, name))
            cells.append(ABSENT if unknown or sign == "<" else sign or f"{other / reference:.2f}")
        rows.append((name, *cells))
    notes = (f"Bits per value of each method / bits per value of {method}, at the same KL. {RELATIVE_NOTE}",)
    return Table(f"Bits at equal KL, relative to {method}", columns, tuple(rows), notes=notes)
