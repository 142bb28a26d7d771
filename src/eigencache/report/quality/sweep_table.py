"""What ranks cost, as tables: every point, and how far each way of compressing may go before perplexity moves."""

from collections.abc import Sequence
from math import inf, log1p

from eigencache.records.quality import Quality, SweepPoint, SweepRecord, SweepSeries
from eigencache.report.core.measured import ABSENT
from eigencache.report.core.table import Table

LIMITS = (0.01, 0.05)  # of perplexity


def interval_cell(quality: Quality) -> str:
    """`0.012 [0.008, 0.016]`; without an interval the number alone."""
    if quality.delta_nll_interval is None:
        return f"{quality.delta_nll:.4f}"
    low, high = quality.delta_nll_interval
    return f"{quality.delta_nll:.4f} [{low:.4f}, {high:.4f}]"


def sweep_table(record: SweepRecord) -> Table:
    """One row per series and rank: bytes, loss with interval, KL, agreement."""
    columns = ("Compressed", "Rank", "Ratio K+V", "Ratio of target", "ΔNLL (nats)", "Δ perplexity", "KL (nats)", "Top-1")
    rows = [
        (
            series.name if index == 0 else "",
            f"{point.rank} of {series.width}",
            f"{point.quality.compression_ratio:.2f}",
            f"{point.target_ratio:.2f}",
            interval_cell(point.quality),
            f"{100 * point.quality.perplexity_increase:+.2f} %",
            f"{point.quality.kl:.4f}",
            f"{100 * point.quality.top1_agreement:.1f} %",
        )
        for series in record.series
        for index, point in enumerate(series.points)
    ]
    title = f"{record.model.name}: quality through the cache against rank"
    return Table(title, columns, tuple(rows), notes=sweep_notes(record), warnings=tuple(record.warnings))


def sweep_notes(record: SweepRecord) -> tuple[str, ...]:
    """How the figures came about, for the foot of a table."""
    scored = record.series[0].points[0].quality
    cached = "latent and rotary key" if record.model.geometry.mla else "K and V"
    return (
        f"{record.corpus.name}: {scored.tokens:,} tokens scored in {scored.sequences} sequences, "
        f"{record.uncompressed_nll:.4f} nats per token uncompressed; {record.protocol.describe()}.",
        f"Basis from {record.calibration.name}, {record.calibration.tokens:,} tokens. "
        f"Ratio: 16-bit bytes of {cached} over the bytes held, what is not compressed included, the basis apart. "
        "Intervals: 95 %, bootstrap over sequences, paired.",
    )


def furthest(points: Sequence[SweepPoint], limit: float, certain: bool) -> SweepPoint | None:
    """The smallest of the points within a perplexity increase; `certain`: by the upper end of the interval."""

    def loss(quality: Quality) -> float:
        if not certain:
            return quality.delta_nll
        return quality.delta_nll_interval[1] if quality.delta_nll_interval else inf

    within = [point for point in points if loss(point.quality) <= log1p(limit)]
    return max(within, key=lambda point: point.quality.compression_ratio, default=None)


def safety_table(record: SweepRecord) -> Table:
    """How far each series may go: the largest measured ratio within +1 % and +5 % perplexity, by value and for certain."""
    columns = ["Compressed"]
    for limit in LIMITS:
        columns += [f"Ratio within +{100 * limit:.0f} %", f"for certain +{100 * limit:.0f} %"]
    rows = []
    for series in record.series:
        cells = [series.name]
        for limit in LIMITS:
            cells += [_cell(series, limit, certain) for certain in (False, True)]
        rows.append(tuple(cells))
    notes = (
        "Ratio of K+V together (of the target alone) at the rank; only ranks that were measured. "
        "For certain: the upper end of the 95 % interval is within the limit.",
    )
    title = f"{record.model.name}: how far compression is safe"
    return Table(title, tuple(columns), tuple(rows), notes=notes)


def _cell(series: SweepSeries, limit: float, certain: bool) -> str:
    point = furthest(series.points, limit, certain)
    if point is None:
        return ABSENT
    return f"{point.quality.compression_ratio:.2f} ({point.target_ratio:.2f}) r{point.rank}"
