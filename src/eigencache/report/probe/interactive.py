"""Interactive figures as plain data: traces and axes that the page draws with plotly.js.

A trace has a tone instead of a color: the name of a tensor (see `palette`), or `layer:0.5` for a position on the color
scale of layers. The page replaces it by the color of its theme.
"""

from dataclasses import dataclass, field
from typing import Any

from eigencache.records.probe import ProbeRecord
from eigencache.report.core.lookup import layers_of
from eigencache.report.core.palette import mark, tone
from eigencache.report.core.series import (
    energies,
    energy_triples,
    head_maps,
    head_range,
    held_out_eigenvalues,
    rank_points,
    ratio_points,
    relative_eigenvalues,
    relative_null,
    spectrum_range,
    spreads,
)
from eigencache.report.probe.sinks import first_shares


@dataclass(frozen=True)
class Interactive:
    """One interactive figure."""

    name: str  # of its CSV file
    title: str
    caption: str  # one sentence on what it shows
    traces: list[dict[str, Any]]
    x: str  # label of the horizontal axis
    y: str  # label of the vertical axis
    axes: dict[str, Any] = field(default_factory=dict)

    @property
    def data(self) -> dict[str, Any]:
        """What the page needs to draw the figure and to write its CSV."""
        return {"traces": self.traces, "x": self.x, "y": self.y, "axes": self.axes}


def _line(name: str, points: tuple[list, list], shade: str, **style: Any) -> dict[str, Any]:
    x, y = points
    return {"type": "scatter", "mode": "lines", "name": name, "x": x, "y": y, "tone": shade, **style}


def spectra_figures(record: ProbeRecord) -> list[Interactive]:
    """Return one figure of eigenvalues per tensor, with held-out means and the null of the layer with the lowest support."""
    low, high = spectrum_range(record)
    figures = []
    for name in record.names:
        spectra, traces = layers_of(record, name), []
        for position, s in enumerate(spectra):
            shade, group = f"layer:{position / max(1, len(spectra) - 1):.3f}", f"layer {s.layer_idx}"
            traces.append(_line(group, relative_eigenvalues(s), shade, legendgroup=group))
            held = _line(f"{group}, held-out", held_out_eigenvalues(s), shade, legendgroup=group, showlegend=False)
            traces.append(held | {"mode": "markers", "marker": {"size": 5}})
        if not spectra:
            continue
        null = relative_null(min(spectra, key=lambda s: s.support))
        if null[0]:
            traces.append(_line("white noise (Marchenko–Pastur)", null, "reference", dash="dot"))
        figures.append(
            Interactive(
                name=f"spectrum-{name}",
                title=f"Spectrum of {name}",
                caption="lines: eigenvalue of each component, centered, heads of a layer concatenated; points: held-out "
                "mean per octave; dotted: white noise of the same total variance",
                traces=traces,
                x="component",
                y="eigenvalue / mean eigenvalue",
                axes={"xaxis": {"type": "log"}, "yaxis": {"type": "log", "range": [low, high]}},
            )
        )
    return figures


def energy_figure(record: ProbeRecord) -> Interactive:
    """Return the figure of energy@k, in-sample and held-out, mean over layers."""
    traces = []
    for name in record.names:
        spectra = layers_of(record, name)
        for held_out, label in ((False, "in-sample"), (True, "held-out")):
            points = energies(spectra, held_out)
            if any(value is not None for value in points[1]):
                style = {"dash": "dash" if held_out else "solid", "symbol": mark(name, interactive=True)}
                traces.append(_line(f"{name}, {label}", points, tone(name), mode="lines+markers", **style))
    return Interactive(
        name="energy",
        title="Energy of the leading k components",
        caption="mean over layers, centered, heads of a layer concatenated; in-sample energy is biased upward",
        traces=traces,
        x="k (components)",
        y="share of energy",
        axes={"xaxis": {"type": "log"}, "yaxis": {"range": [0, 1.02]}},
    )


def head_figures(record: ProbeRecord) -> list[Interactive]:
    """Return one heat map per tensor of effective rank / width by layer and head, all with one color range."""
    maps = head_maps(record)
    low, high = head_range(maps)
    return [
        Interactive(
            name=f"heads-{one.name}",
            title=f"Effective rank / width of {one.name}",
            caption="per head, centered; !: doubtful, —: withheld",
            traces=[
                {
                    "type": "heatmap",
                    "name": one.name,
                    "x": [f"head {head}" for head in one.heads],
                    "y": [f"layer {layer}" for layer in one.layers],
                    "z": one.values,
                    "text": one.marks,
                    "texttemplate": "%{text}",
                    "colorscale": "Cividis",
                    "zmin": low,
                    "zmax": high,
                    "colorbar": {"thickness": 10},
                }
            ],
            x="KV head",
            y="layer",
            axes={"xaxis": {"type": "category"}, "yaxis": {"type": "category", "autorange": "reversed"}},
        )
        for one in maps
    ]


def spread_figure(record: ProbeRecord) -> Interactive:
    """Return the figure of the spread by layer: max/min and 95th/5th percentile."""
    traces = []
    for name in record.names:
        for robust, label in ((False, "max/min"), (True, "p95/p5")):
            style = {"dash": "dash" if robust else "solid", "symbol": mark(name, interactive=True), "mode": "lines+markers"}
            traces.append(_line(f"{name}, {label}", spreads(record, name, robust), tone(name), **style))
    return Interactive(
        name="spread",
        title="Spread of standard deviations over raw dimensions",
        caption="max/min is an extreme-value statistic and grows with the width; the 95th over the 5th percentile does not",
        traces=traces,
        x="layer",
        y="largest / smallest std",
        axes={"yaxis": {"type": "log"}},
    )


def rotation_figure(record: ProbeRecord) -> Interactive | None:
    """Return the figure of the variance that rotating the mean of the keys causes; None for models without rotation."""
    if not record.frames:
        return None
    layers = [float(frame.layer_idx) for frame in record.frames]
    shares = [frame.rotated_mean_share for frame in record.frames]
    kind = record.frames[0].kind
    bar = {"type": "bar", "name": "rotated mean", "x": layers, "y": shares, "tone": tone(f"{kind}_post_rope")}
    return Interactive(
        name="rotation",
        title="Share of the variance after rotation that rotating the mean causes",
        caption="(variance after − variance before rotation) / variance after, by layer",
        traces=[bar],
        x="layer",
        y="share of variance",
        axes={"yaxis": {"range": [0, 1]}},
    )


def sinks_figure(record: ProbeRecord) -> Interactive | None:
    """Return the heat map of the attention on the first token by layer and KV head; None if it was not measured."""
    layers, shares = first_shares(record)
    if not layers:
        return None
    heads = max(map(len, shares))
    trace = {
        "type": "heatmap",
        "name": "share of attention",
        "x": [f"head {head}" for head in range(heads)],
        "y": [f"layer {layer}" for layer in layers],
        "z": [[*row, *[None] * (heads - len(row))] for row in shares],
        "colorscale": "Cividis",
        "zmin": 0,
        "zmax": 1,
        "colorbar": {"thickness": 10},
    }
    return Interactive(
        name="sinks",
        title="Attention on the first token",
        caption="mean attention weight on it, over the queries at least 16 positions later that can attend to it",
        traces=[trace],
        x="KV head",
        y="layer",
        axes={"xaxis": {"type": "category"}, "yaxis": {"type": "category", "autorange": "reversed"}},
    )


def model_figures(record: ProbeRecord) -> list[Interactive]:
    """Return the figures of one model that have data, in the order of the page."""
    rest = [spread_figure(record), *filter(None, (rotation_figure(record), sinks_figure(record)))]
    figures = [*spectra_figures(record), energy_figure(record), *head_figures(record), *rest]
    return [figure for figure in figures if figure.traces]


def cross_figures(records: list[ProbeRecord]) -> list[Interactive]:
    """Return the figures that compare models: energy@32 measured in three ways, effective ranks, and spreads."""
    triples = energy_triples(records)
    labels = [triple.label for triple in triples]
    ways = (
        ("four repeated sentences, in-sample", [triple.repeated for triple in triples], "keys_post_rope", "x"),
        ("this text, in-sample", [triple.this_text for triple in triples], "reference", "circle"),
        ("this text, held-out, before rotation", [triple.held_out.value for triple in triples], "values", "diamond"),
    )
    dots = [_dots(name, x, labels, shade, symbol) for name, x, shade, symbol in ways]
    figures = []
    if triples:
        figures.append(
            Interactive(
                name="repetition",
                title="Energy@32 of a repeated text",
                caption="same models; on four repeated sentences, the original probe measures the repetition of its text",
                traces=dots,
                x="energy@32, mean over layers",
                y="model and kind",
                axes={"xaxis": {"range": [0, 1.02]}, "yaxis": {"type": "category", "autorange": "reversed"}},
            )
        )
    for name, title, caption, unit, points in (
        (
            "ranks",
            "Effective rank / width",
            "mean over layers, before rotation",
            "effective rank / width",
            rank_points(records),
        ),
        ("ratios", "K spread / V spread", "geometric mean over layers", "ratio of spreads", ratio_points(records)),
    ):
        tensors = dict.fromkeys(point.tensor for point in points)
        traces = []
        for tensor in tensors:
            mine = [point for point in points if point.tensor == tensor]
            values = [point.measured.value for point in mine]
            traces.append(_dots(tensor, values, [point.label for point in mine], tone(tensor), mark(tensor, True)))
        axes = {"yaxis": {"type": "category", "autorange": "reversed"}}
        figures.append(Interactive(name, title, caption, traces, unit, "model", axes))
    return figures


def _dots(name: str, x: list, y: list[str], shade: str, symbol: str) -> dict[str, Any]:
    return _line(name, (x, y), shade, mode="markers", symbol=symbol, marker={"size": 11})
