"""`eigencache report [MODEL…]`: one self-contained HTML page, its JSON, and the comparison on the terminal."""

from pathlib import Path
from typing import Annotated

import typer

from eigencache.cli.flags import flags_of, with_flags
from eigencache.cli.options import (
    BatchSize,
    Device,
    Dtype,
    MaxLength,
    Memory,
    Seed,
    Tokens,
    check_folder,
    in_bytes,
    keeping,
    unique,
)
from eigencache.cli.options import Text as TextOption

EXAMPLES = """
[b]Examples[/b]\n
  eigencache report\n
  eigencache report ref-llama ref-qwen2 --text stdlib:held-out --held-out none -o build/report\n
  eigencache report ref-deepseek --budget-ppl 5%\n
  eigencache report meta-llama/Llama-3.2-1B --text hf:wikitext:wikitext-2-raw-v1:train --held-out wikitext2 --device cuda
"""


def run(
    models: Annotated[list[str] | None, typer.Argument(help="Models; default: the four bundled ones.")] = None,
    text: TextOption = "stdlib",
    tokens: Tokens = 131_072,
    held_out: Annotated[
        str, typer.Option("--held-out", help="Text that compression is scored on; none measures no compression.")
    ] = "stdlib:held-out",
    held_out_tokens: Annotated[
        int, typer.Option("--held-out-tokens", min=1, help="Tokens of the held-out text at most.")
    ] = 12_288,
    budget_ppl: Annotated[
        str, typer.Option("--budget-ppl", help="Loss budget as a share of perplexity, such as 1%.")
    ] = "1%",
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for report.html and report.json.")] = Path(
        "eigencache-report"
    ),
    max_length: MaxLength = None,
    device: Device = None,
    dtype: Dtype = None,
    batch_size: BatchSize = 8,
    seed: Seed = 0,
    memory: Memory = None,
) -> None:
    """Probe models, measure what compressing their cache costs, and write report.html (offline) and report.json.

    The page shows spectra, compression ratios with their loss, and recommended settings. The comparison is also printed. An
    interrupted report resumes after the last finished model when it is started again.
    """
    check_folder(output)
    from eigencache.report.core.drawing import require

    require("plotly", "HTML reports")
    from rich.console import Console

    from eigencache.api import report
    from eigencache.cli.progress import progress_bar
    from eigencache.corpora.resolve import read_text
    from eigencache.models.sources import BUNDLED
    from eigencache.records.advice import Budget
    from eigencache.records.base import write_whole
    from eigencache.report.advice.verdict import short_table
    from eigencache.report.core.measured import short_names
    from eigencache.report.html import write_report
    from eigencache.report.probe.comparison import compare_table

    partial = output / "report.partial"
    with keeping(partial), progress_bar("report") as on_progress:
        record = report(
            unique(models or BUNDLED),
            read_text(text),
            None if held_out == "none" else read_text(held_out),
            tokens=tokens,
            held_out_tokens=held_out_tokens,
            max_length=max_length,
            budget=Budget.of_ppl(budget_ppl),
            device=device,
            dtype=dtype,
            batch_size=batch_size,
            memory=in_bytes(memory),
            seed=seed,
            on_progress=on_progress,
            partial=partial,
        )
    console = Console()
    for index, probe in enumerate(record.probes):
        took = f"probe {probe.run.wall_s:.1f} s"
        advice = record.verdicts[index].advice if record.verdicts else None
        if advice:
            took += f", verdict {advice.run.wall_s:.1f} s"
        console.print(f"{probe.model.name}: {took}", markup=False, highlight=False)
    page, data = output / "report.html", output / "report.json"
    write_report(record, page)
    write_whole(data, record.model_dump_json(indent=1).encode())
    partial.unlink(missing_ok=True)
    console.print(compare_table(record.probes))
    if in_short := short_table(record, short_names(record.probes)):
        console.print(in_short)
    for probe, verdict in zip(record.probes, record.verdicts, strict=False):
        if verdict.reason:
            reason = with_flags(verdict.reason, flags_of(run))
            console.print(f"{probe.model.name}: compression was not measured: {reason}", markup=False)
    console.print(f"report: {page}\ndata:   {data}", markup=False, highlight=False, soft_wrap=True)
