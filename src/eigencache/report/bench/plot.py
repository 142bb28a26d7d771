"""The figure of a bench: KL by rate, one line per method.

KL is drawn and not ΔNLL, because it is better determined by few tokens and never negative.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from eigencache.records.bench import BenchPoint, BenchRecord
from eigencache.report.bench.equal_divergence import DIVERGENCES
from eigencache.report.core.drawing import dress, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_COLORS = ("#1f5fbf", "#0b7a8f", "#c2541b", "#e0935a", "#7a4fb5", "#a8336e", "#1a7f5a", "#7d6a1c", "#6a737d", "#b04a4a")
_MARKERS = "osD^vPX*<>p"  # one more than colors, so that the pairs of color and marker do not repeat early
_LEAST = 1e-5  # nats; a KL below, such as that of an exact cache, is drawn here


def plot_bench(record: BenchRecord) -> Figure:
    """Plot KL by bits per value, one panel per context length; means over seeds with their mean intervals."""
    from matplotlib.ticker import LogLocator  # optional, as all of matplotlib

    contexts = sorted(record.corpora)
    figure = new_figure(6.2 * len(contexts), 5.6, f"{record.model.name}: divergence by bytes of the compressed cache")
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
        dress(axes, f"context {context:,} tokens", "bits per value, without side information", "KL (nats per token)")
        axes.set_xscale("log", subs=())
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.set_yscale("log")
        for kl in DIVERGENCES:
            axes.axhline(kl, color="#6a737d", linewidth=0.8, linestyle=":")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    return figure


def _averaged(points: list[BenchPoint]) -> list[tuple[float, float, float, float]]:
    """Return bits, KL and the ends of its interval for every operating point, means over seeds, by ascending bits."""
    rows = []
    for name in dict.fromkeys(p.point for p in points):
        seeds = [p for p in points if p.point == name]
        kl = float(np.mean([p.quality.kl for p in seeds]))
        low, high = np.mean([p.quality.kl_interval or (kl, kl) for p in seeds], 0)
        rows.append((float(np.mean([p.bits_per_value for p in seeds])), *(max(float(x), _LEAST) for x in (kl, low, high))))
    return sorted(rows)
