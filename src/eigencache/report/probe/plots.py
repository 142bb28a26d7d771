"""Static figures of probe records, drawn with matplotlib; their titles name model, frame, centering and scope.

A number that the sample cannot support is not drawn; panels with too few independent vectors are marked.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from eigencache.records.probe import ProbeRecord
from eigencache.report.core.drawing import FAINT, INK, dress, legend, new_figure
from eigencache.report.core.lookup import all_warnings, layers_of, pair
from eigencache.report.core.measured import ROOMY, short_names
from eigencache.report.core.palette import LIGHT, SCALE, mark, tone
from eigencache.report.core.series import (
    HeadMap,
    energies,
    energy_triples,
    head_maps,
    head_range,
    held_out_eigenvalues,
    infinite_layers,
    rank_points,
    ratio_points,
    relative_eigenvalues,
    relative_null,
    spectrum_range,
    spreads,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_WITHHELD = "the sample cannot support this"


def _heading(record: ProbeRecord, scope: str = "centered, heads of a layer concatenated") -> str:
    warnings = len(all_warnings(record))
    loud = f"\n{warnings} warning{'s' if warnings > 1 else ''}: see the table" if warnings else ""
    return f"{short_names([record])[0]} on {record.corpus.name}, {record.corpus.tokens:,} tokens; {scope}{loud}"


def _say(axes: Axes, words: str) -> None:
    axes.text(0.5, 0.5, words, transform=axes.transAxes, ha="center", va="center", fontsize=9, color=INK)


def _doubt(record: ProbeRecord, name: str) -> str:
    """Return a mark and the lowest support for a title, if a layer has too few independent vectors."""
    lowest = min((s.support for s in layers_of(record, name)), default=0.0)
    return f" !\n{lowest:.2g} independent vectors per dimension" if lowest < ROOMY else ""


def _draw_spectra(axes: Axes, record: ProbeRecord, name: str) -> None:
    """Draw λ / mean λ, one line per layer, and the white-noise null of the layer with the lowest support."""
    spectra = layers_of(record, name)
    import matplotlib

    shades = matplotlib.colormaps["viridis"]
    for position, s in enumerate(spectra):
        x, y = relative_eigenvalues(s)
        named = len(spectra) <= 4 or position in (0, len(spectra) - 1)
        shade = shades(0.85 * position / max(1, len(spectra) - 1))
        axes.plot(x, y, color=shade, linewidth=1.2, label=f"layer {s.layer_idx}" if named else None)
        axes.plot(*held_out_eigenvalues(s), ".", color=shade, markersize=4)
    if spectra:
        axes.plot([], [], ".", color=INK, markersize=4, label="held-out, mean per octave")
        x, y = relative_null(min(spectra, key=lambda s: s.support))
        if x:
            axes.plot(x, y, ":", color=INK, linewidth=1.2, label="white noise (Marchenko–Pastur)")
    axes.set(xscale="log", yscale="log", ylim=tuple(10.0**v for v in spectrum_range(record)))
    dress(axes, f"{name}{_doubt(record, name)}", "component", "eigenvalue / mean eigenvalue")
    legend(axes)


def _draw_energy(axes: Axes, record: ProbeRecord, names: list[str]) -> None:
    """Draw energy@k averaged over layers: in-sample solid, held-out dashed."""
    drawn = False
    for name in names:
        for held_out in (False, True):
            x, y = energies(layers_of(record, name), held_out)
            if all(v is None for v in y):
                continue
            drawn = True
            label = f"{name}, held-out" if held_out else f"{name}, in-sample"
            style = {"linestyle": "--" if held_out else "-", "marker": mark(name), "markersize": 3.5}
            axes.plot(x, y, color=LIGHT[tone(name)], linewidth=1.4, label=label, **style)
    axes.set(xscale="log", ylim=(0, 1.02))
    dress(axes, "energy, mean over layers", "k (components)", "share of energy in the leading k")
    legend(axes) if drawn else _say(axes, _WITHHELD)


def _draw_spread(axes: Axes, record: ProbeRecord, names: list[str]) -> None:
    """Draw the spread by layer on a log axis: max/min solid, 95th/5th percentile dashed."""
    from matplotlib.ticker import MaxNLocator

    for name in names:
        infinite = infinite_layers(record, name)
        label = f"{name}, max/min" + (f" (∞ in {len(infinite)} layers)" if infinite else "")
        shape = {"color": LIGHT[tone(name)], "marker": mark(name), "linewidth": 1.4, "markersize": 4}
        axes.plot(*spreads(record, name), linestyle="-", label=label, **shape)
        axes.plot(*spreads(record, name, robust=True), linestyle="--", label=f"{name}, p95/p5", alpha=0.8, **shape)
    axes.set_yscale("log")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    dress(axes, "spread of standard deviations over raw dimensions", "layer", "largest / smallest std")
    legend(axes)


def _draw_heads(figure: Figure, axes: Axes, chart: HeadMap, limits: tuple[float, float], bar: bool) -> None:
    """Draw effective rank / width by layer and head; cells show `!` (doubtful) and `—` (withheld)."""
    grid = [[float("nan") if v is None else v for v in row] for row in chart.values]
    image = axes.imshow(grid, cmap=SCALE, vmin=limits[0], vmax=limits[1], aspect="auto", interpolation="nearest")
    for y, row in enumerate(chart.marks):
        for x, word in enumerate(row):
            axes.text(x, y, word, ha="center", va="center", fontsize=8, color="#c2541b" if chart.values[y][x] else INK)
    dress(axes, chart.name, "KV head", "layer")
    axes.grid(False)
    for axis, labels in ((axes.xaxis, chart.heads), (axes.yaxis, chart.layers)):
        step = max(1, len(labels) // 12)
        axis.set_ticks(range(0, len(labels), step), [str(v) for v in labels[::step]])
    if bar:
        figure.colorbar(image, ax=axes, shrink=0.9).set_label("effective rank / width", fontsize=9)


def _spread_names(record: ProbeRecord) -> list[str]:
    if "latent" in record.names:
        return record.names
    chosen = pair(record)
    return [n for n in dict.fromkeys((chosen.key_before, chosen.key_cached, chosen.value)) if n]


def plot_spectra(record: ProbeRecord) -> Figure:
    """Plot the eigenvalues of every layer and the white-noise null, one panel per tensor."""
    names = record.names
    figure = new_figure(max(6.0, 4.2 * len(names)), 4.2, f"Spectra: {_heading(record)}")
    for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        _draw_spectra(axes, record, name)
    return figure


def plot_energy(record: ProbeRecord) -> Figure:
    """Plot the energy of the leading k components, in-sample (solid) and held-out (dashed)."""
    figure = new_figure(7.5, 5, f"Energy: {_heading(record)}")
    _draw_energy(figure.subplots(), record, record.names)
    return figure


def plot_heads(record: ProbeRecord) -> Figure:
    """Plot effective rank / width by layer and head, one heat map per tensor, all with one color scale."""
    maps = head_maps(record)
    figure = new_figure(
        max(5.5, 3.6 * len(maps) + 0.8), 4.2, f"Effective rank / width: {_heading(record, 'centered, per head')}"
    )
    if not maps:
        _say(figure.subplots(), "no tensor of this record has several heads")
        return figure
    for i, (axes, chart) in enumerate(zip(figure.subplots(1, len(maps), squeeze=False)[0], maps, strict=True)):
        _draw_heads(figure, axes, chart, head_range(maps), bar=i == len(maps) - 1)
    return figure


def plot_spread(record: ProbeRecord) -> Figure:
    """Plot the spread of keys, before and after rotation, and of values by layer."""
    figure = new_figure(8, 5, f"Spread: {_heading(record)}")
    _draw_spread(figure.subplots(), record, _spread_names(record))
    return figure


def plot_probe(record: ProbeRecord) -> Figure:
    """Plot the whole record on one sheet: spectra, energy, spread and heads."""
    names, maps = record.names, head_maps(record)
    columns = max(2, len(names))
    figure = new_figure(4.2 * columns, 12.5 if maps else 8.6, _heading(record))
    rows: Any = figure.subfigures(3 if maps else 2, 1)
    for axes, name in zip(rows[0].subplots(1, len(names), squeeze=False)[0], names, strict=True):
        _draw_spectra(axes, record, name)
    left, right = rows[1].subplots(1, 2)
    _draw_energy(left, record, names)
    _draw_spread(right, record, _spread_names(record))
    if maps:
        rows[2].suptitle("effective rank / width, centered, per head", fontsize=10, color=INK)
        for i, (axes, chart) in enumerate(zip(rows[2].subplots(1, len(maps), squeeze=False)[0], maps, strict=True)):
            _draw_heads(rows[2], axes, chart, head_range(maps), bar=i == len(maps) - 1)
    return figure


def _draw_triples(axes: Axes, records: list[ProbeRecord]) -> None:
    """Draw energy@32 per model and kind: repeated text ×, this text ○, held-out before rotation ●."""
    lines = energy_triples(records)
    styles = (
        ("x", "none", "four repeated sentences, in-sample, post-RoPE"),
        ("o", "none", "this text, in-sample, post-RoPE"),
    )
    for y, line in enumerate(lines):
        color = LIGHT[tone(line.tensor)]
        found = [v for v in (line.repeated, line.this_text, line.held_out.value) if v is not None]
        axes.plot([min(found, default=0), max(found, default=0)], [y, y], color=FAINT, linewidth=3, zorder=1)
        for value, (shape, face, label) in zip((line.repeated, line.this_text), styles, strict=True):
            if value is not None:
                colors: dict[str, Any] = {"color": INK} if shape == "x" else {"facecolors": face, "edgecolors": color}
                axes.scatter([value], [y], marker=shape, s=40, zorder=2, label=label if y == 0 else None, **colors)
        if line.held_out.value is not None:
            label = "held-out, pre-RoPE" if y == 0 else None
            axes.scatter([line.held_out.value], [y], marker="o", s=40, color=color, zorder=3, label=label)
    axes.set_yticks(range(len(lines)), [line.label + (" !" if line.held_out.doubtful else "") for line in lines])
    axes.set(xlim=(0, 1.03), ylim=(len(lines) - 0.4, -1.2 - 0.25 * len(lines)))
    dress(axes, "energy@32, mean over layers", "share of energy in the leading 32 components", "")
    legend(axes) if lines else _say(axes, "no tensor is wider than 32")


def _draw_points(axes: Axes, records: list[ProbeRecord], points: list, title: str, unit: str) -> None:
    models = short_names(records)
    seen: set[str] = set()
    for point in points:
        if point.measured.value is not None and point.measured.value != float("inf"):
            label = None if point.tensor in seen else point.tensor
            seen.add(point.tensor)
            color = LIGHT[tone(point.tensor)]
            axes.scatter(
                [point.measured.value], [models.index(point.label)], marker=mark(point.tensor), color=color, label=label
            )
    axes.set_yticks(range(len(models)), models)
    axes.set_ylim(len(models) - 0.4, -1.2 - 0.25 * len(models))
    dress(axes, title, unit, "")
    legend(axes)


def plot_compare(records: list[ProbeRecord]) -> Figure:
    """Plot all models: energy@32 measured in three ways, effective rank, and the spread of K relative to V."""
    height = 2.6 + 0.42 * max(len(energy_triples(records)), len(records))
    figure = new_figure(15, height, "Models compared: centered, heads of a layer concatenated")
    first, second, third = figure.subplots(1, 3)
    _draw_triples(first, records)
    _draw_points(second, records, rank_points(records), "effective rank, mean over layers", "effective rank / width")
    second.set_xlim(0, 1.03)
    _draw_points(
        third, records, ratio_points(records), "spread, geometric mean over layers", "K spread / V spread (max/min of std)"
    )
    from matplotlib.ticker import NullFormatter, ScalarFormatter

    third.set_xscale("log")
    third.xaxis.set_major_formatter(ScalarFormatter())
    third.xaxis.set_minor_formatter(NullFormatter())
    return figure
