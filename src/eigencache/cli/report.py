"""`eigencache report [MODEL…]`: one self-contained HTML page, its JSON, and the comparison on the terminal."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from eigencache.cli.options import BatchSize, Device, Dtype, MaxLength, Seed, Tokens, check_folder, unique
from eigencache.cli.options import Text as TextOption

if TYPE_CHECKING:
    from eigencache.calibration.moments import CapturedMoments, Progress
    from eigencache.corpora.text import Text
    from eigencache.models.load import LoadedModel
    from eigencache.records.advice import Budget, Verdict

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
        str, typer.Option("--held-out", help="Text that compression is scored on, or none: then nothing is compressed.")
    ] = "stdlib:held-out",
    held_out_tokens: Annotated[int, typer.Option("--held-out-tokens", min=1, help="Tokens of it at most.")] = 12_288,
    budget_ppl: Annotated[str, typer.Option("--budget-ppl", help="Rise of perplexity that is allowed, such as 1%.")] = "1%",
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for report.html and report.json.")] = Path(
        "eigencache-report"
    ),
    max_length: MaxLength = None,
    device: Device = None,
    dtype: Dtype = None,
    batch_size: BatchSize = 8,
    seed: Seed = 0,
) -> None:
    """Probe models, measure what compressing their cache costs, and write report.html (offline) and report.json.

    What is low-rank, what is compressible, at what loss, and what to do; the comparison is printed too.
    """
    check_folder(output)
    from eigencache.report.core.drawing import require

    require("plotly", "HTML reports")
    from rich.console import Console

    from eigencache.calibration.moments import gather
    from eigencache.cli.measuring import load_with_text
    from eigencache.cli.progress import progress_bar
    from eigencache.corpora.resolve import read_text
    from eigencache.models.load import BUNDLED
    from eigencache.records.advice import Budget, ReportRecord
    from eigencache.records.base import write_whole
    from eigencache.report.advice.verdict import short_table
    from eigencache.report.core.measured import short_names
    from eigencache.report.html import write_report
    from eigencache.report.probe.comparison import compare_table
    from eigencache.studies.probe import ProbeSettings, probe_gathered

    console = Console()
    budget, settings = Budget.of_ppl(budget_ppl), ProbeSettings(batch_size=batch_size, seed=seed)
    scored = None if held_out == "none" else read_text(held_out)
    report = ReportRecord(probes=[])
    for model in unique(models or BUNDLED):
        loaded, sequences = load_with_text(
            model, text=text, tokens=tokens, max_length=max_length, device=device, dtype=dtype
        )
        with progress_bar(model) as on_progress:
            gathered = gather(loaded, sequences, settings.scopes, batch_size=batch_size, on_progress=on_progress)
            report.probes.append(probe_gathered(loaded, gathered, settings, on_progress))
            said = f"probe {report.probes[-1].run.wall_s:.1f} s"
            if scored:
                verdict = _judged(loaded, gathered, scored, held_out_tokens, budget, batch_size, seed, on_progress)
                report.verdicts.append(verdict)
                said += f", verdict {verdict.advice.sweeps['given'].run.wall_s:.1f} s" if verdict.advice else ""
        console.print(f"{model}: {said}", markup=False, highlight=False)
    page, data = output / "report.html", output / "report.json"
    write_report(report, page)
    write_whole(data, report.model_dump_json(indent=1).encode())
    console.print(compare_table(report.probes))
    if in_short := short_table(report, short_names(report.probes)):
        console.print(in_short)
    for probe, verdict in zip(report.probes, report.verdicts, strict=False):
        if verdict.reason:
            console.print(f"{probe.model.name}: compression was not measured: {verdict.reason}", markup=False)
    console.print(f"report: {page}\ndata:   {data}", markup=False, highlight=False, soft_wrap=True)


def _judged(
    loaded: "LoadedModel",
    gathered: "CapturedMoments",
    scored: "Text",
    tokens: int,
    budget: "Budget",
    batch_size: int,
    seed: int,
    on_progress: "Progress",
) -> "Verdict":
    """Advice, or the reason why this model, or this text, allows none: the probe is worth its report all the same."""
    from eigencache.corpora.sequences import pack
    from eigencache.errors import EigencacheError
    from eigencache.records.advice import Verdict
    from eigencache.studies.recommend.verdict import judge

    try:
        held_out = pack(scored, loaded.tokenizer, tokens=tokens, max_length=gathered.sequences.corpus.max_length)
        advice = judge(loaded, gathered, held_out, budget, batch_size=batch_size, seed=seed, on_progress=on_progress)
    except EigencacheError as error:
        return Verdict(reason=str(error))
    return Verdict(advice=advice)
