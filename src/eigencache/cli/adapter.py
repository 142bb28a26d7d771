"""`eigencache adapter MODEL`: train residual adapters, analyze and truncate them, and compare them with direct PCA."""

from enum import StrEnum
from typing import Annotated

import typer

from eigencache.cli.options import (
    BatchSize,
    CalibrationTokens,
    Device,
    Dtype,
    Force,
    HeldOutLength,
    HeldOutTokens,
    Memory,
    OutputJson,
    Plot,
    Prefix,
    Seed,
    Text,
    check_plot,
    check_writable,
    in_bytes,
    layer_numbers,
    print_written,
    rank_numbers,
)
from eigencache.errors import CorpusError

EXAMPLES = """
[b]Examples[/b]\n
  eigencache adapter ref-llama\n
  eigencache adapter ref-gpt2 --ranks 32,64,full --output gpt2.json --plot gpt2.png\n
  eigencache adapter ref-llama --loss nll@rank --loss-rank 16 --inner-rank 64 --learning-rate 1e-2\n
  eigencache adapter ref-llama --target k --layers 0,3,6 --steps 20
"""


class AdapterTarget(StrEnum):
    """Which tensor gets the adapter."""

    v = "v"
    k = "k"


class Loss(StrEnum):
    """What the adapters are trained for."""

    nll = "nll"
    nll_tail = "nll+tail"
    nll_at_rank = "nll@rank"


def run(
    model: Annotated[str, typer.Argument(help="ref-gpt2, ref-llama, ref-qwen2, a folder, a .gguf file or a hub name.")],
    target: Annotated[
        AdapterTarget, typer.Option("--target", help="Tensor to adapt: v (values) or k (keys before rotation).")
    ] = AdapterTarget.v,
    layers: Annotated[str | None, typer.Option("--layers", help="Layers to use, such as 0,6,12; default: all.")] = None,
    ranks: Annotated[
        str | None, typer.Option("--ranks", help="Ranks to truncate to, such as 8,16,full; default: quarters of the width.")
    ] = None,
    loss: Annotated[
        Loss,
        typer.Option(
            "--loss",
            help="nll: loss of the text; nll+tail: nll plus the share of variance outside the top r directions; nll@rank: "
            "nll with the adapted vectors projected on the top r directions.",
        ),
    ] = Loss.nll,
    loss_rank: Annotated[
        int | None,
        typer.Option("--loss-rank", help="Rank r of the losses nll+tail and nll@rank; default: half of the width."),
    ] = None,
    tail_weight: Annotated[
        float, typer.Option("--tail-weight", min=0, help="Weight of the tail share in nll+tail, in nats.")
    ] = 1.0,
    inner_rank: Annotated[int, typer.Option("--inner-rank", help="Inner rank: rows of W_in.")] = 16,
    scale: Annotated[float, typer.Option("--scale", help="Scale s in M = I + s·W_out W_in.")] = 1.0,
    steps: Annotated[int, typer.Option("--steps", min=0, help="Training steps; 0 leaves M the identity.")] = 60,
    learning_rate: Annotated[float, typer.Option("--learning-rate", help="Learning rate of Adam, at most 1.")] = 1e-3,
    text: Text = "stdlib:held-out",
    tokens: HeldOutTokens = 16_384,
    max_length: HeldOutLength = 512,
    prefix: Prefix = None,
    chunk: Annotated[
        int | None,
        typer.Option("--chunk", min=1, help="Tokens read at a time, all older ones compressed; replaces --prefix."),
    ] = None,
    calibration_text: Annotated[
        str, typer.Option("--calibration-text", help="Text that adapters are trained on and bases are fitted on.")
    ] = "stdlib",
    calibration_tokens: CalibrationTokens = 65_536,
    force: Force = False,
    output: OutputJson = None,
    plot: Plot = None,
    device: Device = None,
    dtype: Dtype = None,
    batch_size: BatchSize = 4,
    seed: Seed = 0,
    memory: Memory = None,
) -> None:
    """Train residual adapters on values or keys, and compare the loss of their truncation with direct PCA.

    The adapters are also analyzed as linear operators.
    """
    check_writable(output)
    check_plot(plot)
    if prefix and chunk:
        raise CorpusError("--prefix and --chunk choose two ways to read the text. Use one of them.")
    layer_choice, rank_choice = layer_numbers(layers), rank_numbers(ranks)
    from rich.console import Console

    from eigencache.api import adapter
    from eigencache.cli.progress import progress_bar
    from eigencache.corpora.resolve import read_text
    from eigencache.report.adapters.plot import plot_adapter
    from eigencache.report.adapters.tables import operator_table, truncation_table
    from eigencache.report.core.drawing import save_figure
    from eigencache.studies.adapters.training import TrainingSettings

    training = TrainingSettings(
        loss.value, loss_rank, tail_weight, inner_rank, scale, steps, learning_rate, batch_size, seed
    )
    with progress_bar(model) as on_progress:
        record = adapter(
            model,
            text=read_text(text),
            calibration_text=read_text(calibration_text),
            target=target.value,
            layers=layer_choice,
            ranks=rank_choice,
            training=training,
            tokens=tokens,
            calibration_tokens=calibration_tokens,
            max_length=max_length,
            prefix=prefix,
            chunk=chunk,
            force=force,
            device=device,
            dtype=dtype,
            memory=in_bytes(memory),
            on_progress=on_progress,
        )
    if output:
        record.save(output)
    if plot:
        save_figure(plot_adapter(record), plot)
    console = Console()
    console.print(operator_table(record))
    console.print(truncation_table(record))
    print_written(output, plot)
