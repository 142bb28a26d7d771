"""Timings as tables, as a roofline, and as a page for a repository."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import ScalarFormatter

from eigencache.records.base import write_whole
from eigencache.records.speed import SpeedRecord, Timing
from eigencache.report.core.table import Table
from eigencache.report.probe.plots import dress, new_figure, svg_of

_LIVE = "live"
_CODEC = (
    "Live: as a fit may give it, with first tokens in 16 bits, bundles of unlike widths, and, of keys with biases, means "
    "that turn in every pair."
)
_COLORS = {"live": "#1f5fbf", "other": "#c2541b"}


def speed_tables(record: SpeedRecord) -> list[Table]:
    """Of every geometry attention alone, decode steps, generations and prefills, as far as they were timed."""
    found = []
    for name in dict.fromkeys(t.geometry for t in record.timings):
        own = [t for t in record.timings if t.geometry == name]
        for make, part in (
            (_attention_table, "attention"),
            (_decode_table, "decode"),
            (_generation_table, "generation"),
            (_prefill_table, "prefill"),
            (_prefill_table, "chunked prefill"),
        ):
            if timings := [t for t in own if t.part == part]:
                found.append(make(record, name, timings))
    return found


def _attention_table(record: SpeedRecord, name: str, timings: Sequence[Timing]) -> Table:
    rows = []
    for case in _cases(timings):
        best = min(t.seconds for t in case if t.seconds and not t.way.startswith(_LIVE))
        for t in case:
            assert t.seconds is not None and t.nbytes is not None
            read = t.nbytes / t.seconds
            ratio = f"{best / t.seconds:.2f} x" if t.way.startswith(_LIVE) else ""
            share = f"{100 * read / record.read_bytes_per_second:.0f} %"
            rows.append((f"{t.context:,}", str(t.batch), t.way, f"{1e3 * t.seconds:.2f}", ratio, f"{read / 1e9:.1f}", share))
    columns = ("Context", "Batch", "Way", "ms", "Best plain over it", "GB/s read", "Of a copy's")
    note = f"One query a row, one layer. {_where(record)} A copy reads {record.read_bytes_per_second / 1e9:.1f} GB/s."
    return Table(f"{name}: attention of a decode step", columns, tuple(rows), (note,), words=frozenset({"Way"}))


def _decode_table(record: SpeedRecord, name: str, timings: Sequence[Timing]) -> Table:
    return _tokens_table(f"{name}: a whole decode step", "one token a row", _where(record), record, timings)


def _generation_table(record: SpeedRecord, name: str, timings: Sequence[Timing]) -> Table:
    title, where = f"{name}: generation, a token of it", _where(record, f"means over {record.generation_rounds} rounds")
    return _tokens_table(title, "by `generate`, greedy, from so many tokens held on", where, record, timings)


def _tokens_table(title: str, what: str, where: str, record: SpeedRecord, timings: Sequence[Timing]) -> Table:
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
    columns = ("Context", "Batch", "Cache", "MB held", "ms", "Tokens/s", "DynamicCache over it")
    layers = f"{record.layers} layer{'s' if record.layers > 1 else ''} of the model, random weights, {what}."
    notes = (f"{layers} {where}", _CODEC, *(f"{way}: {why}" for way, why in reasons.items()))
    return Table(title, columns, tuple(rows), notes, words=frozenset({"Cache"}))


def _prefill_table(record: SpeedRecord, name: str, timings: Sequence[Timing]) -> Table:
    plain = next(t.seconds for t in timings if t.way == "DynamicCache")
    rows = [
        (f"{t.context:,}", t.way, f"{1e3 * t.seconds:,.0f}", f"{100 * (t.seconds / plain - 1):+.1f} %")
        for t in timings
        if t.seconds and plain
    ]
    columns, where = ("Prompt", "Cache", "ms", "Over DynamicCache"), _where(record, f"medians of {record.prefill_repeats}")
    chunked = timings[0].part == "chunked prefill"
    title = f"{name}: prefill, {record.chunk:,} tokens at a time" if chunked else f"{name}: prefill"
    return Table(title, columns, tuple(rows), (where,), words=frozenset({"Cache"}))


def _where(record: SpeedRecord, how: str = "") -> str:
    machine = f"{record.run.machine}, torch {record.run.torch}, {record.dtype}"
    of = how or f"medians of {record.repeats}"
    return f"{machine}; {of}, all in turn; packed blocks are read by the backend {record.backend}."


def _cases(timings: Sequence[Timing]) -> list[list[Timing]]:
    """By context and batch, in their order."""
    keys = dict.fromkeys((t.context, t.batch) for t in timings)
    return [[t for t in timings if (t.context, t.batch) == key] for key in keys]


def plot_roofline(record: SpeedRecord) -> Figure | None:
    """Operations a second against operations per byte of attention, under what memory and products allow; None for none."""
    timings = [t for t in record.timings if t.part == "attention" and t.seconds and t.nbytes and t.operations]
    if not timings:
        return None
    figure = new_figure(7.2, 5.2, f"Attention of a decode step: roofline\n{record.run.machine}, {record.dtype}")
    axes = figure.subplots()
    intensities = [t.operations / t.nbytes for t in timings]  # type: ignore[operator]
    read, products = record.read_bytes_per_second, record.operations_per_second
    x = np.geomspace(min(intensities) / 2, max(*intensities, products / read) * 2, 100)
    axes.plot(x, np.minimum(x * read, products) / 1e9, color="#1b1f24", linewidth=1.2)
    for live, color in ((True, _COLORS["live"]), (False, _COLORS["other"])):
        own = [t for t in timings if t.way.startswith(_LIVE) == live]
        axes.scatter(
            [t.operations / t.nbytes for t in own],  # type: ignore[operator]
            [t.operations / t.seconds / 1e9 for t in own],  # type: ignore[operator]
            s=[4 * np.log2(1 + t.context) for t in own],
            color=color,
            alpha=0.8,
            label="live cache, packed" if live else f"{record.dtype}, plain",
        )
    dress(axes, "larger marks: longer contexts", "operations per byte of the cache", "thousand million operations a second")
    for axis, scale in ((axes.xaxis, axes.set_xscale), (axes.yaxis, axes.set_yscale)):
        scale("log", base=2)
        axis.set_major_formatter(ScalarFormatter())
    axes.legend(frameon=False, fontsize=8)
    return figure


def write_speed(record: SpeedRecord, folder: Path, command: str) -> list[Path]:
    """`README.md`, `speed.json` and, where attention was timed, `roofline.svg`. Raises `OutputError`."""
    figure = plot_roofline(record)
    parts = ["# Speed of the live cache beside its peers", f"Printed by `{command}`."]
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
