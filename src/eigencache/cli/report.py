"""`eigencache report [MODEL…]`: one self-contained HTML page, its JSON, and the comparison on the terminal."""

from pathlib import Path
from typing import Annotated

import typer

from eigencache.cli.options import BatchSize, Device, Dtype, MaxLength, Seed, Text, Tokens, check_folder, unique

EXAMPLES = """
[b]Examples[/b]\n
  eigencache report\n
  eigencache report ref-llama ref-qwen2 --text stdlib:held-out -o build/report\n
  eigencache report meta-llama/Llama-3.2-1B --text wikitext2 --device cuda
"""


def run(
    models: Annotated[list[str] | None, typer.Argument(help="Models; default: the four bundled ones.")] = None,
    text: Text = "stdlib",
    tokens: Tokens = 131_072,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for report.html and report.json.")] = Path(
        "eigencache-report"
    ),
    max_length: MaxLength = None,
    device: Device = None,
    dtype: Dtype = None,
    batch_size: BatchSize = 8,
    seed: Seed = 0,
) -> None:
    """Probe models and write report.html (offline, interactive) and report.json; print the comparison."""
    check_folder(output)
    from rich.console import Console

    from eigencache.cli.measuring import measure_model
    from eigencache.models.load import BUNDLED
    from eigencache.records import ReportRecord, write_whole
    from eigencache.report.comparison import compare_table
    from eigencache.report.html import write_report
    from eigencache.studies.probe import ProbeSettings

    console = Console()
    records = []
    for model in unique(models or BUNDLED):
        settings = ProbeSettings(batch_size=batch_size, seed=seed)
        records.append(
            measure_model(model, settings, text=text, tokens=tokens, max_length=max_length, device=device, dtype=dtype)
        )
        console.print(f"{model}: {records[-1].run.wall_s:.1f} s", markup=False, highlight=False)
    page, data = output / "report.html", output / "report.json"
    write_report(records, page)
    write_whole(data, ReportRecord(probes=records).model_dump_json(indent=1).encode())
    console.print(compare_table(records))
    console.print(f"report: {page}\ndata:   {data}", markup=False, highlight=False, soft_wrap=True)
