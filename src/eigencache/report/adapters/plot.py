"""Residual adapters in one figure: gains of M, energy against variance, and perplexity over the rank of the cache."""

import math

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import ScalarFormatter

from eigencache.records.adapter import AdapterRecord, Method, Operator
from eigencache.report.adapters.tables import METHODS, TENSORS
from eigencache.report.core.palette import LIGHT
from eigencache.report.probe.plots import dress, legend, new_figure

_STYLES: dict[Method, tuple[str, str, str]] = {  # color, marker, line
    "operator-svd": (LIGHT["keys_post_rope"], "s", "-"),
    "operator-svd-centered": (LIGHT["keys_post_rope"], "s", "--"),
    "random-basis": (LIGHT["reference"], "x", ":"),
    "adapted-pca": (LIGHT["values"], "^", "--"),
    "direct-pca": (LIGHT["values"], "^", "-"),
}


def plot_adapter(record: AdapterRecord) -> Figure:
    """Gains, energies and perplexities of one record; the title names model, tensor, loss and distance from identity."""
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
    """Singular values of M of every layer, dark to light; an identity is the line at 1."""
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
    """Energy of M, which follows r/p near the identity, beside the variance that r directions keep; means of layers."""
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
    dress(axes, "shares, mean of layers", "rank r", "share")
    legend(axes)


def _draw_perplexity(axes: Axes, record: AdapterRecord) -> None:
    """exp(NLL) through the cache over the rank, each method; lines without marks are the uncompressed caches."""
    for method, words in METHODS.items():
        results = record.of(method)
        color, marker, line = _STYLES[method]
        x, y = [r.rank for r in results], [math.exp(r.quality.nll) for r in results]
        axes.plot(x, y, color=color, marker=marker, markersize=4.5, linestyle=line, linewidth=1.4, label=words)
    for nll, line, words in (
        (record.frozen_nll, "-", "Uncompressed, frozen"),
        (record.adapted_nll, "--", "Uncompressed, adapted"),
    ):
        axes.axhline(math.exp(nll), color=LIGHT["reference"], linestyle=line, linewidth=0.9, label=words)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.yaxis.set_minor_formatter(ScalarFormatter())
    dress(axes, "perplexity through the cache", "rank of the cache per layer", "perplexity")
    axes.tick_params(which="minor", labelsize=8)
    legend(axes)
