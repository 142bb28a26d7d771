"""Tables of a sweep: every point, and the largest ratio of every series within a perplexity increase."""

from collections.abc import Sequence
from math import inf, log1p

from eigencache.records.quality import Quality, SweepPoint, SweepRecord, SweepSeries
from eigencache.report.core.measured import ABSENT
from eigencache.report.core.table import Table

LIMITS = (0.01, 0.05)  # perplexity increase, a share


def interval_cell(quality: Quality) -> str:
    """Return ΔNLL with its interval: `0.0120 [0.0080, 0.0160]`; without an interval the number alone."""
    if quality.delta_nll_interval is None:
        return f"{quality.delta_nll:.4f}"
    low, high = quality.delta_nll_interval
    return f"{quality.delta_nll:.4f} [{low:.4f}, {high:.4f}]"


def kl_cell(quality: Quality) -> str:
    """Return the KL divergence with its interval: `0.0064 [0.0058, 0.0071]`; without an interval the number alone."""
    if quality.kl_interval is None:
        return f"{quality.kl:.4f}"
    low, high = quality.kl_interval
    return f"{quality.kl:.4f} [{low:.4f}, {high:.4f}]"


def sweep_table(record: SweepRecord) -> Table:
    """Return one row per series and rank: ratios, loss with interval, KL, top-1 agreement."""
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
    title = f"{record.model.name}: loss by rank"
    return Table(title, columns, tuple(rows), notes=sweep_notes(record), warnings=tuple(record.warnings), identity=2)


def sweep_notes(record: SweepRecord) -> tuple[str, ...]:
    """Return the notes of a sweep: text, protocol, calibration, and definitions."""
    scored = record.series[0].points[0].quality
    cached = "latent and rotary key" if record.model.geometry.mla else "keys and values"
    return (
        f"{record.corpus.name}: {scored.tokens:,} tokens scored in {scored.sequences} sequences, "
        f"{record.uncompressed_nll:.4f} nats per token uncompressed; {record.protocol.describe()}.",
        f"Basis from {record.calibration.name}, {record.calibration.tokens:,} tokens. "
        f"Ratio = bytes of the 16-bit cache ({cached}) / bytes of the cache with the target compressed. Side information is "
        "stored once and not included. Intervals: 95 %, paired bootstrap over sequences.",
    )


def furthest(points: Sequence[SweepPoint], limit: float, certain: bool) -> SweepPoint | None:
    """Return the point with the largest ratio within a perplexity increase; None if no point is.

    Args:
        points: Points of one series or several.
        limit: Perplexity increase, a share.
        certain: Compare the upper end of the 95 % interval instead of the estimate.
    """

    def loss(quality: Quality) -> float:
        if not certain:
            return quality.delta_nll
        return quality.delta_nll_interval[1] if quality.delta_nll_interval else inf

    within = [point for point in points if loss(point.quality) <= log1p(limit)]
    return max(within, key=lambda point: point.quality.compression_ratio, default=None)


def safety_table(record: SweepRecord) -> Table:
    """Return the largest measured ratio of every series within +1 % and +5 % perplexity, by estimate and by interval."""
    columns = ["Compressed"]
    for limit in LIMITS:
        columns += [f"Estimate within +{100 * limit:.0f} %", f"Upper end within +{100 * limit:.0f} %"]
    rows = []
    for series in record.series:
        cells = [series.name]
        for limit in LIMITS:
            cells += [_cell(series, limit, certain) for certain in (False, True)]
        rows.append(tuple(cells))
    notes = (
        "Cells: largest ratio of the whole cache (of the target alone), and its rank, among the measured ranks, with a "
        "perplexity increase within the limit. Upper end: of the 95 % interval.",
    )
    title = f"{record.model.name}: largest ratio within a perplexity increase"
    return Table(title, tuple(columns), tuple(rows), notes=notes)


def _cell(series: SweepSeries, limit: float, certain: bool) -> str:
    point = furthest(series.points, limit, certain)
    if point is None:
        return ABSENT
    return f"{point.quality.compression_ratio:.2f} ({point.target_ratio:.2f}) r{point.rank}"
