"""The figure of residual adapters: gains of M, its energy and the variance it keeps, and perplexity by rank."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from eigencache.records.adapter import AdapterRecord, Method, Operator
from eigencache.report.adapters.tables import METHODS, TENSORS
from eigencache.report.core.drawing import dress, legend, new_figure
from eigencache.report.core.palette import LIGHT

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_STYLES: dict[Method, tuple[str, str, str]] = {  # color, marker, line
    "operator-svd": (LIGHT["keys_post_rope"], "s", "-"),
    "operator-svd-centered": (LIGHT["keys_post_rope"], "s", "--"),
    "random-basis": (LIGHT["reference"], "x", ":"),
    "adapted-pca": (LIGHT["values"], "^", "--"),
    "direct-pca": (LIGHT["values"], "^", "-"),
}


def plot_adapter(record: AdapterRecord) -> Figure:
    """Plot the gains of M, its energy and the variance it keeps, and perplexity by rank, in three panels."""
    distances = [o.distance for o in record.operators]
    title = (
        f"{record.model.name}: residual adapters on {TENSORS[record.target]}, loss {record.training.loss}, "
        f"distance from identity {min(distances):.3f} to {max(distances):.3f}; scored on {record.corpus.name}"
    )
    figure = new_figure(15, 4.6, title)
    first, second, third = figure.subplots(1, 3)
    _draw_gains(first, record.operators)
    _draw_energy(second, record.operators)
    _draw_perplexity(third, record)
    return figure


def _draw_gains(axes: Axes, operators: list[Operator]) -> None:
    """Draw the singular values of M, one line per layer, and those of the identity."""
    import matplotlib

    shades = matplotlib.colormaps["viridis"]
    for position, o in enumerate(operators):
        named = len(operators) <= 4 or position in (0, len(operators) - 1)
        shade = shades(0.85 * position / max(1, len(operators) - 1))
        label = f"layer {o.layer_idx}" if named else None
        axes.plot(range(1, o.width + 1), o.singular_values, color=shade, linewidth=1.2, label=label)
    axes.axhline(1, color=LIGHT["reference"], linestyle=":", linewidth=1.2, label="identity")
    axes.set_ylim(0, None)
    dress(axes, "gains of M", "component", "singular value")
    legend(axes)


def _draw_energy(axes: Axes, operators: list[Operator]) -> None:
    """Draw the energy of M and the variance that r directions keep, means over layers; r/p is that of the identity."""
    width = min(o.width for o in operators)
    axes.plot([0, width], [0, 1], color=LIGHT["reference"], linestyle=":", label=f"r/p, p = {width}")
    ranks = sorted(set.intersection(*(set(o.energy) for o in operators)))
    lines = (
        ([o.energy for o in operators], "energy@r of M", LIGHT["keys_pre_rope"], "o"),
        ([o.variance_kept for o in operators], "variance in M's first r directions", LIGHT["keys_post_rope"], "s"),
        ([o.variance_energy for o in operators], "variance in the best r directions", LIGHT["values"], "^"),
    )
    for shares, label, color, marker in lines:
        means = [sum(of_layer[r] for of_layer in shares) / len(shares) for r in ranks]
        axes.plot(ranks, means, color=color, marker=marker, markersize=3.5, label=label)
    axes.set_ylim(0, 1.02)
    dress(axes, "shares, mean over layers", "rank r", "share")
    legend(axes)


def _draw_perplexity(axes: Axes, record: AdapterRecord) -> None:
    """Draw the perplexity of every method by rank, and that of the uncompressed caches as horizontal lines."""
    from matplotlib.ticker import ScalarFormatter

    for method, label in METHODS.items():
        results = record.of(method)
        color, marker, line = _STYLES[method]
        x, y = [r.rank for r in results], [math.exp(r.quality.nll) for r in results]
        axes.plot(x, y, color=color, marker=marker, markersize=4.5, linestyle=line, linewidth=1.4, label=label)
    for nll, line, label in (
        (record.frozen_nll, "-", "Uncompressed, frozen model"),
        (record.adapted_nll, "--", "Uncompressed, adapted model"),
    ):
        axes.axhline(math.exp(nll), color=LIGHT["reference"], linestyle=line, linewidth=0.9, label=label)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.yaxis.set_minor_formatter(ScalarFormatter())
    dress(axes, "perplexity", "cached coefficients per layer", "perplexity")
    axes.tick_params(which="minor", labelsize=8)
    legend(axes)
