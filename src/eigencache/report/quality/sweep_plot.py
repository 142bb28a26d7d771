"""The figure of a sweep: perplexity increase by rank and by ratio, one line per series."""

from __future__ import annotations

from math import expm1
from typing import TYPE_CHECKING

from eigencache.records.quality import SweepPoint, SweepRecord, SweepSeries
from eigencache.report.core.drawing import dress, new_figure
from eigencache.report.quality.sweep_table import LIMITS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLORS = ("#1f5fbf", "#1a7f5a", "#c2541b", "#7a4fb5", "#a8336e", "#0b7a8f", "#7d6a1c", "#6a737d")
_MARKERS = "o^sDvPX*"


def plot_sweep(record: SweepRecord) -> Figure:
    """Plot the perplexity increase with 95 % intervals by share of the full rank, and by ratio of the whole cache."""
    title = f"{record.model.name} on {record.corpus.name}: {record.protocol.describe()}"
    figure = new_figure(11, 5.2, title)
    by_rank, by_ratio = figure.subplots(1, 2, sharey=True)
    for index, series in enumerate(record.series):
        _draw(by_rank, series, index, [point.rank / series.width for point in series.points])
        _draw(by_ratio, series, index, [point.quality.compression_ratio for point in series.points])
    dress(by_rank, "by rank", "rank / full rank", "perplexity increase (%)")
    dress(by_ratio, "by ratio", "bytes of the 16-bit cache / bytes of the compressed cache", "")
    for axes in (by_rank, by_ratio):
        axes.set_yscale("symlog", linthresh=1)
        for limit in LIMITS:
            axes.axhline(100 * limit, color="#6a737d", linewidth=0.8, linestyle=":")
    handles = by_rank.get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    return figure


def _draw(axes: Axes, series: SweepSeries, index: int, x: list[float]) -> None:
    color, marker = _COLORS[index % len(_COLORS)], _MARKERS[index % len(_MARKERS)]
    y = [100 * point.quality.perplexity_increase for point in series.points]
    bars = [_bar(point) for point in series.points]
    below, above = ([bar[i] for bar in bars] for i in (0, 1))
    axes.errorbar(
        x, y, yerr=(below, above), color=color, marker=marker, markersize=4, linewidth=1.2, capsize=2, label=series.name
    )


def _bar(point: SweepPoint) -> tuple[float, float]:
    """Return the length of the interval below and above the point, in per cent of perplexity."""
    quality = point.quality
    if quality.delta_nll_interval is None:
        return 0.0, 0.0
    low, high = (100 * expm1(end) for end in quality.delta_nll_interval)
    value = 100 * quality.perplexity_increase
    return max(0.0, value - low), max(0.0, high - value)
