"""The figure of a bench: loss by rate, one line per method."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from eigencache.records.bench import BenchPoint, BenchRecord
from eigencache.report.core.drawing import dress, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_COLORS = ("#1f5fbf", "#0b7a8f", "#c2541b", "#e0935a", "#7a4fb5", "#a8336e", "#1a7f5a", "#7d6a1c", "#6a737d", "#b04a4a")
_MARKERS = "osD^vPX*<>p"  # one more than colors, so that the pairs of color and marker do not repeat early
_LINEAR_BELOW = 0.001  # nats; the loss axis is logarithmic above


def plot_bench(record: BenchRecord) -> Figure:
    """Plot ΔNLL by bits per value, one panel per context length; means over seeds with their mean intervals."""
    contexts = sorted(record.corpora)
    figure = new_figure(6.2 * len(contexts), 5.6, f"{record.model.name}: loss by bytes of the compressed cache")
    panels = figure.subplots(1, len(contexts), sharey=True, squeeze=False)[0]
    methods = list(dict.fromkeys(p.method for p in record.points))
    for axes, context in zip(panels, contexts, strict=True):
        for index, method in enumerate(methods):
            points = [p for p in record.points if p.method == method and p.context == context]
            if not points:
                continue
            bits, losses, low, high = (np.array(x) for x in zip(*_averaged(points), strict=True))
            axes.errorbar(
                bits,
                losses,
                yerr=(np.maximum(losses - low, 0), np.maximum(high - losses, 0)),
                color=_COLORS[index % len(_COLORS)],
                marker=_MARKERS[index % len(_MARKERS)],
                markersize=4,
                linewidth=1.8 if method == "eigen" else 1.1,
                elinewidth=0.6,
                label=method,
            )
        dress(axes, f"context {context:,} tokens", "bits per value, without side information", "ΔNLL (nats per token)")
        axes.set_xscale("log")
        axes.set_yscale("symlog", linthresh=_LINEAR_BELOW)
        for loss in sorted({rate.delta_nll for rate in record.equal_loss}):
            axes.axhline(loss, color="#6a737d", linewidth=0.8, linestyle=":")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    return figure


def _averaged(points: list[BenchPoint]) -> list[tuple[float, float, float, float]]:
    """Return bits, ΔNLL and the ends of its interval for every operating point, means over seeds, by ascending bits."""
    rows = []
    for name in dict.fromkeys(p.point for p in points):
        seeds = [p for p in points if p.point == name]
        loss = float(np.mean([p.quality.delta_nll for p in seeds]))
        intervals = [p.quality.delta_nll_interval or (loss, loss) for p in seeds]
        rows.append((float(np.mean([p.bits_per_value for p in seeds])), loss, *map(float, np.mean(intervals, 0))))
    return sorted(rows)
