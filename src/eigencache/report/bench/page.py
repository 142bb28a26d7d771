"""The leaderboard: a folder with a Markdown page, an HTML page, and a plot and a record per model."""

from collections.abc import Sequence
from html import escape
from importlib import resources
from pathlib import Path, PurePath
from urllib.parse import quote

from eigencache.records.base import write_whole
from eigencache.records.bench import BenchRecord
from eigencache.report.bench.equal_divergence import against_by_divergence_table, divergences_table
from eigencache.report.bench.equal_loss import against_table, frontier_table
from eigencache.report.bench.plot import plot_bench
from eigencache.report.bench.points import points_table
from eigencache.report.core.drawing import svg_of
from eigencache.report.core.table import Table
from eigencache.report.quality.evaluation import divergence_table, retrieval_table

REFERENCE = "eigen"  # the method that others are compared with


def write_bench(records: Sequence[BenchRecord], folder: Path, command: str) -> list[Path]:
    """Write `README.md`, `bench.html`, and `MODEL.svg` and `MODEL.json` for every model.

    Args:
        records: One bench per model.
        folder: Folder to write to; made if it does not exist.
        command: Command that printed them; the page names it.

    Returns:
        The files that were written.

    Raises:
        OutputError: A file cannot be written.
    """
    plots = {record.model.name: svg_of(plot_bench(record), record.model.name) for record in records}
    files = {folder / f"{file_name(r.model.name)}.json": r.model_dump_json(indent=1).encode() for r in records}
    files |= {folder / f"{file_name(name)}.svg": svg.encode() for name, svg in plots.items()}
    files |= {
        folder / "README.md": markdown(records, command).encode(),
        folder / "bench.html": page(records, plots).encode(),
    }
    for path, data in files.items():
        write_whole(path, data)
    return list(files)


def file_name(model: str) -> str:
    """Return the file name of a model without path separators: `meta-llama/Llama-3.2-1B` → `meta-llama--Llama-3.2-1B`."""
    return "--".join(part for part in PurePath(model).parts if part.strip("/.")) or "model"


def markdown(records: Sequence[BenchRecord], command: str) -> str:
    """Return the Markdown page: tables relative to the reference method, then those of every model.

    Args:
        records: One bench per model.
        command: Command that printed them.
    """
    parts = ["# Leaderboard: bytes at equal loss", f"Printed by `{command}`."]
    parts += [table.markdown() for table in against_tables(records)]
    for record in records:
        parts += [f"## {record.model.name}", f"![loss by bytes]({quote(file_name(record.model.name))}.svg)"]
        parts += [table.markdown() for table in tables_of(record)]
    return "\n\n".join(parts) + "\n"


def tables_of(record: BenchRecord) -> list[Table]:
    """Return the tables of one model: rates at equal KL and equal ΔNLL, then generation and retrieval."""
    contexts = sorted(record.corpora)
    frontiers = [table(record, context) for context in contexts for table in (divergences_table, frontier_table)]
    return [*frontiers, *generation_tables(record)]


def generation_tables(record: BenchRecord) -> list[Table]:
    """Return greedy generation and retrieval of each method's cheapest point with a KL of at most 0.03 nats, if measured."""
    tables = [divergence_table(record)] if record.divergence else []
    return [*tables, retrieval_table(record)] if record.retrieval else tables


def against_tables(records: Sequence[BenchRecord]) -> list[Table]:
    """Return the tables of all methods relative to the reference method; none if that was not measured."""
    if not any(rate.method == REFERENCE for record in records for rate in record.equal_loss):
        return []
    return [against_by_divergence_table(records, REFERENCE), against_table(records, REFERENCE)]


def page(records: Sequence[BenchRecord], plots: dict[str, str]) -> str:
    """Return the HTML page, which loads nothing from the network and has all operating points.

    Args:
        records: One bench per model.
        plots: Model name → `<svg>` element.
    """
    body = []
    for record in records:
        body += [f"<h2>{escape(record.model.name)}</h2>", _warnings(record), plots[record.model.name]]
        body += [table.html() for table in tables_of(record)]
        points = "".join(points_table(record, context).html() for context in sorted(record.corpora))
        body.append(f"<details><summary>All operating points</summary>{points}</details>")
    against = [table.html() for table in against_tables(records)]
    css = (resources.files("eigencache.report.assets") / "page.css").read_text(encoding="utf8")
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" '
        'content="width=device-width, initial-scale=1"><title>Eigencache bench</title>'
        f"<style>{css} svg{{max-width:100%;height:auto;background:#fff}}</style></head><body><header><h1>Bytes at equal loss"
        f"</h1></header><main>{''.join([*against, *body])}</main></body></html>\n"
    )


def _warnings(record: BenchRecord) -> str:
    items = "".join(f"<li>{escape(warning)}</li>" for warning in record.warnings)
    return f'<section class="warnings" role="note"><ul>{items}</ul></section>' if items else ""
