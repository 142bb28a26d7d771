"""Quality against rank and against bytes, one line per way of compressing, intervals drawn."""

from math import expm1

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from eigencache.records.quality import SweepPoint, SweepRecord, SweepSeries
from eigencache.report.probe.plots import dress, new_figure
from eigencache.report.quality.sweep_table import LIMITS

_COLORS = ("#1f5fbf", "#1a7f5a", "#c2541b", "#7a4fb5", "#a8336e", "#0b7a8f", "#7d6a1c", "#6a737d")
_MARKS = "o^sDvPX*"


def plot_sweep(record: SweepRecord) -> Figure:
    """Perplexity increase against the share of the full rank, and against the ratio of all bytes."""
    title = f"{record.model.name} on {record.corpus.name}: {record.protocol.describe()}"
    figure = new_figure(11, 5.2, title)
    ranks, ratios = figure.subplots(1, 2, sharey=True)
    for index, series in enumerate(record.series):
        _line(ranks, series, index, [point.rank / series.width for point in series.points])
        _line(ratios, series, index, [point.quality.compression_ratio for point in series.points])
    dress(ranks, "against rank", "rank, share of the full width", "perplexity increase (%)")
    dress(ratios, "against bytes", "16-bit bytes of the whole cache / bytes held", "")
    for axes in (ranks, ratios):
        axes.set_yscale("symlog", linthresh=1)
        for limit in LIMITS:
            axes.axhline(100 * limit, color="#6a737d", linewidth=0.8, linestyle=":")
    figure.legend(*ranks.get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    return figure


def _line(axes: Axes, series: SweepSeries, index: int, x: list[float]) -> None:
    color, mark = _COLORS[index % len(_COLORS)], _MARKS[index % len(_MARKS)]
    y = [100 * point.quality.perplexity_increase for point in series.points]
    bars = [_bar(point) for point in series.points]
    below, above = ([bar[i] for bar in bars] for i in (0, 1))
    axes.errorbar(
        x, y, yerr=(below, above), color=color, marker=mark, markersize=4, linewidth=1.2, capsize=2, label=series.name
    )


def _bar(point: SweepPoint) -> tuple[float, float]:
    """How far the interval reaches below and above the point, in per cent of perplexity."""
    quality = point.quality
    if quality.delta_nll_interval is None:
        return 0.0, 0.0
    low, high = (100 * expm1(end) for end in quality.delta_nll_interval)
    value = 100 * quality.perplexity_increase
    return max(0.0, value - low), max(0.0, high - value)
