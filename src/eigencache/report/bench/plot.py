"""Loss against all bytes held, one line per method: the lower and the further left, the better."""

import numpy as np
from matplotlib.figure import Figure

from eigencache.records.bench import BenchPoint, BenchRecord
from eigencache.report.probe.plots import dress, new_figure

_COLORS = ("#1f5fbf", "#0b7a8f", "#c2541b", "#e0935a", "#7a4fb5", "#a8336e", "#1a7f5a", "#7d6a1c", "#6a737d", "#b04a4a")
_MARKS = "osD^vPX*<>p"  # one more than colors, so that no two of many methods look alike
_LEAST = 0.001  # nats: below it the scale is linear


def plot_bench(record: BenchRecord) -> Figure:
    """ΔNLL against bits per value, a panel per length of context; seeds averaged, intervals over sequences drawn."""
    contexts = sorted(record.corpora)
    figure = new_figure(6.2 * len(contexts), 5.6, f"{record.model.name}: loss through the cache against all bytes held")
    panels = figure.subplots(1, len(contexts), sharey=True, squeeze=False)[0]
    methods = list(dict.fromkeys(p.method for p in record.points))
    for axes, context in zip(panels, contexts, strict=True):
        for index, method in enumerate(methods):
            own = [p for p in record.points if p.method == method and p.context == context]
            if not own:
                continue
            bits, losses, low, high = (np.array(x) for x in zip(*_averaged(own), strict=True))
            axes.errorbar(
                bits,
                losses,
                yerr=(np.maximum(losses - low, 0), np.maximum(high - losses, 0)),
                color=_COLORS[index % len(_COLORS)],
                marker=_MARKS[index % len(_MARKS)],
                markersize=4,
                linewidth=1.8 if method == "eigen" else 1.1,
                elinewidth=0.6,
                label=method,
            )
        dress(axes, f"{context:,} tokens held", "bits per value, all bytes, basis apart", "ΔNLL (nats per token)")
        axes.set_xscale("log")
        axes.set_yscale("symlog", linthresh=_LEAST)
        for loss in sorted({one.delta_nll for one in record.equal_loss}):
            axes.axhline(loss, color="#6a737d", linewidth=0.8, linestyle=":")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    return figure


def _averaged(points: list[BenchPoint]) -> list[tuple[float, float, float, float]]:
    """Bits, ΔNLL and its interval of every operating point, means over seeds, bits ascending."""
    rows = []
    for name in dict.fromkeys(p.point for p in points):
        own = [p for p in points if p.point == name]
        loss = float(np.mean([p.quality.delta_nll for p in own]))
        intervals = [p.quality.delta_nll_interval or (loss, loss) for p in own]
        rows.append((float(np.mean([p.bits_per_value for p in own])), loss, *map(float, np.mean(intervals, 0))))
    return sorted(rows)
