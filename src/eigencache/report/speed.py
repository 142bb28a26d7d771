"""Tables, a roofline plot and a page of measured times."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from eigencache.records.base import write_whole
from eigencache.records.speed import SpeedRecord, Timing
from eigencache.report.core.drawing import dress, new_figure, svg_of
from eigencache.report.core.table import Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_LIVE = "live"  # the implementations whose names begin so are the live cache
_CODEC_NOTE = (
    "live: a codec with the features of a fitted one: sinks in 16 bits, bundles of different widths and, for keys with "
    "biases, a rotated mean."
)
_COLORS = {"live": "#1f5fbf", "other": "#c2541b"}


def speed_tables(record: SpeedRecord) -> list[Table]:
    """Return the tables of every geometry that was timed: attention, decode steps, generations, prefills."""
    tables = []
    for geometry in dict.fromkeys(t.geometry for t in record.timings):
        of_geometry = [t for t in record.timings if t.geometry == geometry]
        for make, part in (
            (_attention_table, "attention"),
            (_decode_table, "decode"),
            (_generation_table, "generation"),
            (_prefill_table, "prefill"),
            (_prefill_table, "chunked prefill"),
        ):
            if timings := [t for t in of_geometry if t.part == part]:
                tables.append(make(record, geometry, timings))
    return tables


def _attention_table(record: SpeedRecord, geometry: str, timings: Sequence[Timing]) -> Table:
    rows = []
    for case in _cases(timings):
        best = min(t.seconds for t in case if t.seconds and not t.way.startswith(_LIVE))
        for t in case:
            assert t.seconds is not None and t.nbytes is not None
            read = t.nbytes / t.seconds
            speedup = f"{best / t.seconds:.2f} x" if t.way.startswith(_LIVE) else ""
            share = f"{100 * read / record.read_bytes_per_second:.0f} %"
            row = (f"{t.context:,}", str(t.batch), t.way, f"{1e3 * t.seconds:.2f}", speedup, f"{read / 1e9:.1f}", share)
            rows.append(row)
    columns = ("Context", "Batch", "Implementation", "ms", "Speedup over best 16-bit", "GB/s read", "Share of copy speed")
    copy = f"A copy reads {record.read_bytes_per_second / 1e9:.1f} GB/s."
    note = f"One query per sequence, one layer. {_machine(record)} {copy}"
    title = f"{geometry}: attention of a decode step"
    return Table(title, columns, tuple(rows), (note,), words=frozenset({"Implementation"}), identity=3)


def _decode_table(record: SpeedRecord, geometry: str, timings: Sequence[Timing]) -> Table:
    note = _machine(record)
    return _tokens_table(f"{geometry}: a whole decode step", "one token per sequence", note, record, timings)


def _generation_table(record: SpeedRecord, geometry: str, timings: Sequence[Timing]) -> Table:
    title, note = f"{geometry}: generation, per token", _machine(record, f"means of {record.generation_rounds} rounds")
    return _tokens_table(title, "greedy `generate` that continues a filled cache", note, record, timings)


def _tokens_table(title: str, task: str, note: str, record: SpeedRecord, timings: Sequence[Timing]) -> Table:
    rows, reasons = [], {}
    for case in _cases(timings):
        plain = next(t.seconds for t in case if t.way == "DynamicCache")
        for t in case:
            if t.seconds is None or t.nbytes is None or plain is None:
                reasons[t.way] = t.why
                continue
            rows.append(
                (
                    f"{t.context:,}",
                    str(t.batch),
                    t.way,
                    f"{t.nbytes / 1e6:,.1f}",
                    f"{1e3 * t.seconds:.1f}",
                    f"{t.batch / t.seconds:.1f}",
                    f"{plain / t.seconds:.2f} x",
                )
            )
    columns = ("Context", "Batch", "Cache", "Cache (MB)", "ms", "Tokens/s", "Speedup over DynamicCache")
    layers = f"{record.layers} layer{'s' if record.layers > 1 else ''} of the model, random weights, {task}."
    notes = (f"{layers} {note}", _CODEC_NOTE, *(f"{way}: {why}" for way, why in reasons.items()))
    return Table(title, columns, tuple(rows), notes, words=frozenset({"Cache"}), identity=3)


def _prefill_table(record: SpeedRecord, geometry: str, timings: Sequence[Timing]) -> Table:
    plain = next(t.seconds for t in timings if t.way == "DynamicCache")
    rows = [
        (f"{t.context:,}", t.way, f"{1e3 * t.seconds:,.0f}", f"{100 * (t.seconds / plain - 1):+.1f} %")
        for t in timings
        if t.seconds and plain
    ]
    columns = ("Prompt", "Cache", "ms", "Overhead over DynamicCache")
    note = _machine(record, f"medians of {record.prefill_repeats}")
    chunked = timings[0].part == "chunked prefill"
    title = f"{geometry}: prefill, {record.chunk:,} tokens at a time" if chunked else f"{geometry}: prefill"
    return Table(title, columns, tuple(rows), (note,), words=frozenset({"Cache"}), identity=2)


def _machine(record: SpeedRecord, statistic: str = "") -> str:
    """Describe the machine and the statistic that is reported."""
    machine = f"{record.run.machine}, torch {record.run.torch}, {record.dtype}"
    statistic = statistic or f"medians of {record.repeats}"
    return f"{machine}; {statistic}, all implementations interleaved; backend for packed blocks: {record.backend}."


def _cases(timings: Sequence[Timing]) -> list[list[Timing]]:
    """Group timings by context and batch, in their order."""
    keys = dict.fromkeys((t.context, t.batch) for t in timings)
    return [[t for t in timings if (t.context, t.batch) == key] for key in keys]


def plot_roofline(record: SpeedRecord) -> Figure | None:
    """Plot the operations per second of attention by operations per byte, with the bounds of memory and arithmetic.

    Returns:
        The figure; None if attention was not timed.
    """
    timings = [t for t in record.timings if t.part == "attention" and t.seconds and t.nbytes and t.operations]
    if not timings:
        return None
    figure = new_figure(7.2, 5.2, f"Attention of a decode step: roofline\n{record.run.machine}, {record.dtype}")
    from matplotlib.ticker import ScalarFormatter

    axes = figure.subplots()
    intensities = [t.operations / t.nbytes for t in timings]  # type: ignore[operator]
    memory, arithmetic = record.read_bytes_per_second, record.operations_per_second
    x = np.geomspace(min(intensities) / 2, max(*intensities, arithmetic / memory) * 2, 100)
    axes.plot(x, np.minimum(x * memory, arithmetic) / 1e9, color="#1b1f24", linewidth=1.2)
    for live, color in ((True, _COLORS["live"]), (False, _COLORS["other"])):
        shown = [t for t in timings if t.way.startswith(_LIVE) == live]
        axes.scatter(
            [t.operations / t.nbytes for t in shown],  # type: ignore[operator]
            [t.operations / t.seconds / 1e9 for t in shown],  # type: ignore[operator]
            s=[4 * np.log2(1 + t.context) for t in shown],
            color=color,
            alpha=0.8,
            label="live cache, packed" if live else f"{record.dtype}, uncompressed",
        )
    dress(axes, "larger markers: longer contexts", "operations per byte of the cache", "10⁹ operations per second")
    for axis, scale in ((axes.xaxis, axes.set_xscale), (axes.yaxis, axes.set_yscale)):
        scale("log", base=2)
        axis.set_major_formatter(ScalarFormatter())
    axes.legend(frameon=False, fontsize=8)
    return figure


def write_speed(record: SpeedRecord, folder: Path, command: str) -> list[Path]:
    """Write `README.md`, `speed.json` and, if attention was timed, `roofline.svg`.

    Args:
        record: The timings.
        folder: Folder to write to; made if it does not exist.
        command: Command that printed them; the page names it.

    Returns:
        The files that were written.

    Raises:
        OutputError: A file cannot be written.
    """
    figure = plot_roofline(record)
    parts = ["# Speed of the live cache and of other caches", f"Printed by `{command}`."]
    parts += ["![roofline](roofline.svg)"] if figure else []
    parts += [table.markdown() for table in speed_tables(record)]
    files = {
        folder / "README.md": ("\n\n".join(parts) + "\n").encode(),
        folder / "speed.json": record.model_dump_json(indent=1).encode(),
    }
    if figure:
        files[folder / "roofline.svg"] = svg_of(figure, "roofline").encode()
    for path, data in files.items():
        write_whole(path, data)
    return list(files)
