"""`eigencache compare A.json B.json …`: models side by side, from the records of earlier probes."""

from pathlib import Path
from typing import Annotated

import typer

from eigencache.cli.options import (
    Plot,
    check_plot,
    check_writable,
)

EXAMPLES = """
[b]Examples[/b]\n
  eigencache compare gpt2.json llama.json\n
  eigencache compare *.json --output models.md --plot models.png
"""


def run(
    records: Annotated[list[Path], typer.Argument(help="Records written by `eigencache probe --output`.")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write the table as Markdown.")] = None,
    plot: Plot = None,
) -> None:
    """Compare models: columns of the original probe and an assessment with its reasons, then held-out columns."""
    check_writable(output)
    check_plot(plot)
    from rich.console import Console

    from eigencache.records.base import write_whole
    from eigencache.records.probe import ProbeRecord
    from eigencache.report.core.drawing import save_figure
    from eigencache.report.probe.comparison import compare_table
    from eigencache.report.probe.plots import plot_compare

    loaded = [ProbeRecord.load(path) for path in records]
    table = compare_table(loaded)
    if output:
        write_whole(output, table.markdown().encode())
    if plot:
        save_figure(plot_compare(loaded), plot)
    console = Console()
    console.print(table)
    for path in filter(None, (output, plot)):
        console.print(f"written: {path}", markup=False, highlight=False)
