"""`eigencache recommend MODEL|REPORT.json`: which way to compress a cache within a budget, measured, with the evidence."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from eigencache.cli.options import (
    BatchSize,
    CalibrationText,
    CalibrationTokens,
    Device,
    Dtype,
    Force,
    Seed,
    Text,
    check_writable,
)

if TYPE_CHECKING:
    from eigencache.records.advice import Advice, Budget
    from eigencache.records.probe import ProbeRecord

EXAMPLES = """
[b]Examples[/b]\n
  eigencache recommend ref-llama\n
  eigencache recommend ref-qwen2 --budget-nll 0.02 --output advice.json\n
  eigencache recommend report/report.json --model ref-deepseek --budget-ppl 5%\n
  eigencache recommend sweep.json --budget-ppl 0.5%\n
  eigencache recommend Qwen/Qwen2.5-0.5B --text wikitext2 --tokens 98304 --max-length 2048
"""
_MEASURING = (
    "text",
    "tokens",
    "max_length",
    "prefix",
    "calibration_text",
    "calibration_tokens",
    "force",
    "device",
    "dtype",
    "batch_size",
    "seed",
)


def run(
    context: typer.Context,
    subject: Annotated[
        str,
        typer.Argument(
            metavar="MODEL|REPORT.json", help="A model as everywhere, or the JSON that probe, report or sweep wrote."
        ),
    ],
    budget_nll: Annotated[str | None, typer.Option("--budget-nll", help="Loss allowed in nats per token: 0.01.")] = None,
    budget_ppl: Annotated[
        str | None,
        typer.Option("--budget-ppl", help="Loss allowed as a share of perplexity, 1% or 0.01; the default is 1%."),
    ] = None,
    model: Annotated[str | None, typer.Option("--model", help="Which model of a report with several.")] = None,
    text: Text = "stdlib:held-out",
    tokens: Annotated[int, typer.Option("--tokens", min=1, help="Tokens of the held-out text at most.")] = 40_960,
    max_length: Annotated[int, typer.Option("--max-length", min=16, help="Tokens per sequence.")] = 1024,
    prefix: Annotated[int | None, typer.Option("--prefix", min=8, help="Tokens held encoded; default half.")] = None,
    calibration_text: CalibrationText = "stdlib",
    calibration_tokens: CalibrationTokens = 131_072,
    force: Force = False,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write the record as JSON.")] = None,
    device: Device = None,
    dtype: Dtype = None,
    batch_size: BatchSize = 8,
    seed: Seed = 0,
) -> None:
    """Advise on compressing a cache: what of it, in which basis, to which bytes, at which loss measured through the cache.

    The way is chosen on one half of the held-out sequences and its loss is stated on the other half. The JSON of a sweep
    is advised from as it is, without measuring. With --output, an interrupted run goes on where it stopped.
    """
    check_writable(output)
    budget = _budget(budget_nll, budget_ppl)
    from rich.console import Console

    from eigencache.records.quality import SweepRecord
    from eigencache.report.advice.tables import advice_lines, advice_tables, evidence_lines
    from eigencache.studies.recommend.recommend import partial_paths, recommend_sweep
    from eigencache.studies.recommend.subject import read_subject

    partial = output.with_name(f"{output.name}.partial") if output else None
    found = read_subject(subject, model)
    if isinstance(found, SweepRecord):
        _refuse_measuring(context, subject)
        advice = recommend_sweep(found, budget, subject)
    else:
        advice = _measured(
            subject,
            None if isinstance(found, str) else found,
            budget,
            text=text,
            tokens=tokens,
            max_length=max_length,
            prefix=prefix or max_length // 2,
            calibration_text=calibration_text,
            calibration_tokens=calibration_tokens,
            device=device,
            dtype=dtype,
            batch_size=batch_size,
            seed=seed,
            force=force,
            partial=partial,
        )
    if output:
        advice.save(output)
    for path in filter(None, partial_paths(partial).values()):
        path.unlink(missing_ok=True)
    console = Console()
    for line in advice_lines(advice):
        console.print(line, markup=False, highlight=False)
    for table in advice_tables(advice):
        console.print(table)
    for line in evidence_lines(advice):
        console.print(line, markup=False, highlight=False)
    if output:
        console.print(f"written: {output}", markup=False, highlight=False)


def _measured(
    subject: str,
    probe: "ProbeRecord | None",
    budget: "Budget",
    *,
    text: str,
    tokens: int,
    max_length: int,
    prefix: int,
    calibration_text: str,
    calibration_tokens: int,
    device: str | None,
    dtype: str | None,
    batch_size: int,
    seed: int,
    force: bool,
    partial: Path | None,
) -> "Advice":
    """Load what is asked about, check it against its probe, and measure with progress bars."""
    from eigencache.cli.measuring import load_with_text, pack_with_progress
    from eigencache.cli.progress import progress_bar
    from eigencache.records.quality import ReadingProtocol
    from eigencache.studies.recommend.recommend import recommend_model
    from eigencache.studies.recommend.subject import check_same_model

    name = probe.model.name if probe else subject
    dtype = dtype or (probe.model.dtype if probe else None)  # the fingerprint is of weights in that dtype
    loaded, held_out = load_with_text(name, text=text, tokens=tokens, max_length=max_length, device=device, dtype=dtype)
    if probe:
        check_same_model(loaded, probe, subject)
    calibration = pack_with_progress(loaded, calibration_text, calibration_tokens, min(512, max_length))
    with progress_bar(name) as on_progress:
        return recommend_model(
            loaded,
            held_out,
            calibration,
            budget,
            ReadingProtocol(kind="prefix", length=prefix),
            batch_size=batch_size,
            seed=seed,
            force=force,
            probe=probe,
            subject=subject,
            partial=partial,
            on_progress=on_progress,
        )


def _budget(nll: str | None, ppl: str | None) -> "Budget":
    from eigencache.errors import BudgetError
    from eigencache.records.advice import DEFAULT_PPL, Budget

    if nll is not None and ppl is not None:
        raise BudgetError("--budget-nll and --budget-ppl: give one of them; both say how much may be lost")
    if nll is not None:
        return Budget.of_nll(nll)
    return Budget.of_ppl(DEFAULT_PPL if ppl is None else ppl)


def _refuse_measuring(context: typer.Context, subject: str) -> None:
    """Raises `RecordError` for options that say how to measure, where nothing is measured."""
    from eigencache.errors import RecordError

    given = [name for name in _MEASURING if getattr(context.get_parameter_source(name), "name", "") == "COMMANDLINE"]
    if given:
        option = f"--{given[0].replace('_', '-')}"
        raise RecordError(f"{option}: {subject} is a sweep, and nothing is measured anew: leave it out, or name the model")
