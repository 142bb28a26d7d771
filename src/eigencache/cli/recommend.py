"""`eigencache recommend MODEL|REPORT.json`: what compresses a cache within a budget, for each use, with the evidence."""

from typing import TYPE_CHECKING, Annotated

import typer

from eigencache.cli.options import (
    BatchSize,
    CalibrationText,
    CalibrationTokens,
    Device,
    Dtype,
    Force,
    HeldOutLength,
    HeldOutTokens,
    Memory,
    OutputJson,
    Prefix,
    Seed,
    Text,
    check_writable,
    in_bytes,
    partial_of,
    print_written,
    unique,
)

if TYPE_CHECKING:
    from eigencache.records.advice import Budget

EXAMPLES = """
[b]Examples[/b]\n
  eigencache recommend ref-llama\n
  eigencache recommend ref-qwen2 --budget-nll 0.02 --output advice.json\n
  eigencache recommend report/report.json --model ref-deepseek --budget-ppl 5%\n
  eigencache recommend smollm2 --families eigen,live --calibration-tokens 32768 -o advice.json\n
  eigencache recommend sweep.json --budget-ppl 0.5%\n
  eigencache recommend Qwen/Qwen2.5-0.5B --text wikitext2 --tokens 98304 --max-length 2048
"""
_MEASURING = (
    "families",
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
    "memory",
)


def run(
    context: typer.Context,
    subject: Annotated[
        str,
        typer.Argument(metavar="MODEL|REPORT.json", help="Model, or the JSON file that probe, report or sweep wrote."),
    ],
    budget_nll: Annotated[
        str | None, typer.Option("--budget-nll", help="Loss budget in nats per token, such as 0.01.")
    ] = None,
    budget_ppl: Annotated[
        str | None,
        typer.Option("--budget-ppl", help="Loss budget as a share of perplexity, such as 1% or 0.01; default: 1%."),
    ] = None,
    families: Annotated[
        str,
        typer.Option(
            "--families",
            help="What to measure, separated by commas: pca (low rank, for research; slowest), eigen (stored caches) and "
            "live (the cache while generating).",
        ),
    ] = "pca,eigen,live",
    model: Annotated[
        str | None, typer.Option("--model", help="Model to use when the JSON of a report contains several.")
    ] = None,
    text: Text = "stdlib:held-out",
    tokens: HeldOutTokens = 40_960,
    max_length: HeldOutLength = 1024,
    prefix: Prefix = None,
    calibration_text: CalibrationText = "stdlib",
    calibration_tokens: CalibrationTokens = 131_072,
    force: Force = False,
    output: OutputJson = None,
    device: Device = None,
    dtype: Dtype = None,
    batch_size: BatchSize = 8,
    seed: Seed = 0,
    memory: Memory = None,
) -> None:
    """Recommend what compresses a cache within a loss budget, with the command that makes the codec.

    There is one recommendation for each use: a codec for caches that are stored, a live cache to generate with, and low
    rank for research. A setting is chosen on one half of the held-out sequences and its loss is stated on the other half.
    The JSON of a sweep is used without measuring anything; that of a probe names the model that is measured. With --output,
    an interrupted run resumes when it is started again.
    """
    check_writable(output)
    budget = _budget(budget_nll, budget_ppl)
    from rich.console import Console

    from eigencache.api import recommend
    from eigencache.cli.progress import progress_bar
    from eigencache.corpora.resolve import read_text
    from eigencache.records.quality import SweepRecord
    from eigencache.report.advice.tables import advice_lines, advice_tables, evidence_lines
    from eigencache.studies.recommend.recommend import partial_paths
    from eigencache.studies.recommend.subject import read_subject

    partial = partial_of(output)
    found = read_subject(subject, model)
    if isinstance(found, SweepRecord):
        _refuse_measuring(context, subject)
        advice = recommend(subject, budget=budget)
    else:
        with progress_bar(found if isinstance(found, str) else found.model.name) as on_progress:
            advice = recommend(
                subject,
                text=read_text(text),
                calibration_text=calibration_text,
                budget=budget,
                families=unique(name.strip() for name in families.split(",")),  # type: ignore[arg-type] - checked there
                model=model,
                tokens=tokens,
                calibration_tokens=calibration_tokens,
                max_length=max_length,
                prefix=prefix,
                force=force,
                partial=partial,
                device=device,
                dtype=dtype,
                batch_size=batch_size,
                memory=in_bytes(memory),
                seed=seed,
                on_progress=on_progress,
            )
    if output:
        advice.save(output)
    for path in filter(None, partial_paths(partial).values()):
        path.unlink(missing_ok=True)
    console = Console()
    for line in advice_lines(advice):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    for table in advice_tables(advice):
        console.print(table)
    for line in evidence_lines(advice):
        console.print(line, markup=False, highlight=False)
    print_written(output)


def _budget(nll: str | None, ppl: str | None) -> "Budget":
    from eigencache.errors import BudgetError
    from eigencache.records.advice import DEFAULT_PPL, Budget

    if nll is not None and ppl is not None:
        raise BudgetError("--budget-nll and --budget-ppl both set the loss budget. Use one of them.")
    if nll is not None:
        return Budget.of_nll(nll)
    return Budget.of_ppl(DEFAULT_PPL if ppl is None else ppl)


def _refuse_measuring(context: typer.Context, subject: str) -> None:
    """Raise `RecordError` for options that control a measurement, where nothing is measured."""
    from eigencache.errors import RecordError

    given = [name for name in _MEASURING if getattr(context.get_parameter_source(name), "name", "") == "COMMANDLINE"]
    if given:
        option = f"--{given[0].replace('_', '-')}"
        raise RecordError(f"{option}: {subject} is a sweep, so nothing is measured. Leave it out, or name the model.")
