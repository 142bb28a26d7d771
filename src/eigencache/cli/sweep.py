"""`eigencache sweep MODEL`: direct PCA of keys, values or latents at every rank, scored through the cache."""

from typing import Annotated

import typer

from eigencache.cli.options import (
    BatchSize,
    Bits,
    CalibrationText,
    CalibrationTokens,
    CoefficientBits,
    Device,
    Dtype,
    Force,
    Frame,
    HeldOutLength,
    HeldOutTokens,
    Memory,
    Metric,
    Model,
    OneFrame,
    OutputJson,
    Plot,
    Prefix,
    Scope,
    ScopeName,
    Seed,
    TargetName,
    Text,
    check_plot,
    check_writable,
    finish,
    in_bytes,
    keeping,
    partial_of,
    print_written,
    rank_numbers,
)

EXAMPLES = """
[b]Examples[/b]\n
  eigencache sweep ref-qwen2\n
  eigencache sweep ref-llama --target v --ranks 8,16,24,full --metric fisher\n
  eigencache sweep ref-llama --target k --frame post --uncentered --bits 8\n
  eigencache sweep ref-deepseek --target latent --scope layer --output mla.json --plot mla.png\n
  eigencache sweep meta-llama/Llama-3.2-1B --text wikitext2 --calibration-text stdlib --max-length 2048
"""


def run(
    model: Model,
    target: Annotated[
        list[TargetName] | None,
        typer.Option("--target", help="Tensor to compress; can be repeated; default: all that the model caches."),
    ] = None,
    ranks: Annotated[
        str | None, typer.Option("--ranks", help="Ranks to score, such as 8,16,full; default: ten steps to the full rank.")
    ] = None,
    scope: Scope = ScopeName.head,
    frame: Frame = OneFrame.pre,
    metric: Metric = "fisher",
    alpha: Annotated[
        float, typer.Option("--alpha", min=0, max=1, help="Exponent of the metric; 0 is the Frobenius norm.")
    ] = 1.0,
    centered: Annotated[bool, typer.Option("--centered/--uncentered", help="Center vectors on their mean, or not.")] = True,
    bits: CoefficientBits = Bits.sixteen,
    controls: Annotated[
        bool, typer.Option("--controls", help="Score a basis pooled over heads and a random basis as well.")
    ] = False,
    text: Text = "stdlib:held-out",
    tokens: HeldOutTokens = 100_352,
    max_length: HeldOutLength = 1024,
    prefix: Prefix = None,
    calibration_text: CalibrationText = "stdlib",
    calibration_tokens: CalibrationTokens = 131_072,
    force: Force = False,
    output: OutputJson = None,
    plot: Plot = None,
    device: Device = None,
    dtype: Dtype = None,
    batch_size: BatchSize = 8,
    seed: Seed = 0,
    memory: Memory = None,
) -> None:
    """Measure the loss of low-rank compression through the cache, by tensor, rank and bytes.

    With --output, an interrupted run resumes when it is started again.
    """
    check_writable(output)
    check_plot(plot)
    numbers = rank_numbers(ranks)
    from rich.console import Console

    from eigencache.api import sweep
    from eigencache.cli.progress import progress_bar
    from eigencache.codec.pca import CoefficientBits as CodecBits
    from eigencache.corpora.resolve import read_text
    from eigencache.fitting.pca_settings import PCASettings
    from eigencache.report.core.drawing import save_figure
    from eigencache.report.quality.sweep_plot import plot_sweep
    from eigencache.report.quality.sweep_table import safety_table, sweep_table

    widths: dict[Bits, CodecBits] = {Bits.sixteen: 16, Bits.eight: 8, Bits.four: 4}
    with keeping(partial_of(output)), progress_bar(model) as on_progress:
        record = sweep(
            model,
            text=read_text(text),
            calibration_text=read_text(calibration_text),
            targets=[one.value for one in target] if target else None,
            ranks=numbers,
            settings=PCASettings("v", scope.value, frame.value, metric, centered, alpha),
            bits=widths[bits],
            controls=controls,
            tokens=tokens,
            calibration_tokens=calibration_tokens,
            max_length=max_length,
            prefix=prefix,
            force=force,
            partial=partial_of(output),
            device=device,
            dtype=dtype,
            batch_size=batch_size,
            memory=in_bytes(memory),
            seed=seed,
            on_progress=on_progress,
        )
    if output:
        record.save(output)
    finish(output)
    if plot:
        save_figure(plot_sweep(record), plot)
    console = Console()
    console.print(sweep_table(record))
    console.print(safety_table(record))
    print_written(output, plot)
