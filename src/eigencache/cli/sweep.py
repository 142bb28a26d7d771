"""`eigencache sweep MODEL`: direct PCA of keys, values or latents at every rank, scored through the cache."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

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
    check_plot,
    check_writable,
    rank_numbers,
)
from eigencache.cli.probe import ScopeName

EXAMPLES = """
[b]Examples[/b]\n
  eigencache sweep ref-qwen2\n
  eigencache sweep ref-llama --target v --ranks 8,16,24,full --metric fisher\n
  eigencache sweep ref-llama --target k --frame post --uncentered --bits 8\n
  eigencache sweep ref-deepseek --target latent --scope layer --output mla.json --plot mla.png\n
  eigencache sweep meta-llama/Llama-3.2-1B --text wikitext2 --calibration-text stdlib --max-length 2048
"""


class TargetName(StrEnum):
    """What is compressed; the rest stays in 16 bits."""

    k = "k"
    v = "v"
    kv = "kv"
    latent = "latent"
    key_rope = "key_rope"


class OneFrame(StrEnum):
    """Keys before or after rotation."""

    pre = "pre"
    post = "post"


class MetricName(StrEnum):
    """What an error is weighed with."""

    frobenius = "frobenius"
    attention = "attention"
    fisher = "fisher"


class Bits(StrEnum):
    """Bits of a stored coefficient."""

    sixteen = "16"
    eight = "8"
    four = "4"


def run(
    model: Annotated[str, typer.Argument(help="A bundled model, a folder, a .gguf file or a hub name.")],
    target: Annotated[
        list[TargetName] | None, typer.Option("--target", help="May be given more than once; default: all of the model's.")
    ] = None,
    ranks: Annotated[str | None, typer.Option("--ranks", help="Such as 8,16,full; default: ten steps to full.")] = None,
    scope: Annotated[ScopeName, typer.Option("--scope", help="One basis per head, per layer, or for all layers.")] = (
        ScopeName.head
    ),
    frame: Annotated[OneFrame, typer.Option("--frame", help="Keys before or after rotation.")] = OneFrame.pre,
    metric: Annotated[MetricName, typer.Option("--metric", help="What an error is weighed with.")] = MetricName.fisher,
    alpha: Annotated[float, typer.Option("--alpha", min=0, max=1, help="Power of the metric: 0 is frobenius.")] = 1.0,
    centered: Annotated[bool, typer.Option("--centered/--uncentered", help="About the mean, or about zero.")] = True,
    bits: Annotated[Bits, typer.Option("--bits", help="Bits of a stored coefficient.")] = Bits.sixteen,
    controls: Annotated[bool, typer.Option("--controls", help="Also a basis pooled over heads, and a random one.")] = False,
    text: Text = "stdlib:held-out",
    tokens: Annotated[int, typer.Option("--tokens", min=1, help="Tokens of the held-out text at most.")] = 100_352,
    max_length: Annotated[int, typer.Option("--max-length", min=16, help="Tokens per sequence.")] = 1024,
    prefix: Annotated[int | None, typer.Option("--prefix", min=8, help="Tokens held encoded; default half.")] = None,
    calibration_text: CalibrationText = "stdlib",
    calibration_tokens: CalibrationTokens = 131_072,
    force: Force = False,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write the record as JSON.")] = None,
    plot: Annotated[Path | None, typer.Option("--plot", help="Write a plot (.png, .svg, .pdf).")] = None,
    device: Device = None,
    dtype: Dtype = None,
    batch_size: BatchSize = 8,
    seed: Seed = 0,
) -> None:
    """Sweep ranks: what direct low-rank compression costs, per target, against rank and bytes, through the cache.

    With --output, an interrupted run goes on where it stopped when it is started again.
    """
    check_writable(output)
    check_plot(plot)
    numbers = rank_numbers(ranks)
    from rich.console import Console

    from eigencache.cli.measuring import load_with_text, pack_with_progress
    from eigencache.cli.progress import progress_bar
    from eigencache.codec.pca import CoefficientBits
    from eigencache.fitting.pca import PCACalibration, PCASettings
    from eigencache.records.quality import ReadingProtocol
    from eigencache.report.core.drawing import save_figure
    from eigencache.report.quality.sweep_plot import plot_sweep
    from eigencache.report.quality.sweep_table import safety_table, sweep_table
    from eigencache.studies.sweep import Plan, check_plans, control_plans, default_plans, needed_scopes, sweep_model

    loaded, held_out = load_with_text(model, text=text, tokens=tokens, max_length=max_length, device=device, dtype=dtype)
    settings = PCASettings("v", scope.value, frame.value, metric.value, centered, alpha)
    widths: dict[Bits, CoefficientBits] = {Bits.sixteen: 16, Bits.eight: 8, Bits.four: 4}
    width = widths[bits]
    if target is None:
        plans = default_plans(loaded, settings, bits=width, ranks=numbers)
    else:
        plans = [Plan(settings.of(one.value), width, numbers) for one in dict.fromkeys(target)]
    if controls:
        plans = list(dict.fromkeys(plans + control_plans(loaded, bits=width, ranks=numbers)))
    check_plans(loaded, plans)
    calibration_sequences = pack_with_progress(loaded, calibration_text, calibration_tokens, min(512, max_length))
    protocol = ReadingProtocol(kind="prefix", length=prefix or max_length // 2)
    partial = output.with_name(f"{output.name}.partial") if output else None
    with progress_bar(model) as on_progress:
        calibration = PCACalibration(
            loaded, calibration_sequences, scopes=needed_scopes(plans), seed=seed, on_progress=on_progress
        )
        record = sweep_model(
            loaded,
            held_out,
            calibration,
            plans,
            protocol,
            batch_size=batch_size,
            force=force,
            partial=partial,
            on_progress=on_progress,
        )
    if output:
        record.save(output)
    if partial:
        partial.unlink(missing_ok=True)
    if plot:
        save_figure(plot_sweep(record), plot)
    console = Console()
    console.print(sweep_table(record))
    console.print(safety_table(record))
    for path in filter(None, (output, plot)):
        console.print(f"written: {path}", markup=False, highlight=False)
