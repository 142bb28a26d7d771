"""`eigencache mla MODEL`: compare the latent cache with the expanded one, and with a model of standard attention."""

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
    HeldOutLength,
    HeldOutTokens,
    Memory,
    Scope,
    ScopeName,
    Seed,
    Text,
    check_writable,
    in_bytes,
    print_written,
)

EXAMPLES = """
[b]Examples[/b]\n
  eigencache mla ref-deepseek\n
  eigencache mla ref-deepseek --against ref-llama --scope all\n
  eigencache mla deepseek-ai/DeepSeek-V2-Lite --text wikitext2 --calibration-text wikitext2:train -o mla.json
"""


def run(
    model: Annotated[str, typer.Argument(help="An MLA model: ref-deepseek, a folder or a hub name.")] = "ref-deepseek",
    against: Annotated[
        str | None, typer.Option("--against", help="Model with keys and values to compare with at equal bytes.")
    ] = None,
    scope: Scope = ScopeName.head,
    text: Text = "stdlib:held-out",
    tokens: HeldOutTokens = 32_768,
    max_length: HeldOutLength = 1024,
    calibration_text: CalibrationText = "stdlib",
    calibration_tokens: CalibrationTokens = 131_072,
    force: Force = False,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write the sweep of the latent as JSON.")] = None,
    device: Device = None,
    dtype: Dtype = None,
    batch_size: BatchSize = 8,
    seed: Seed = 0,
    memory: Memory = None,
) -> None:
    """Measure MLA: bytes and logits of the latent and the expanded cache, and the loss of low-rank latents, keys and values.

    With --against, the loss is also compared with a model of standard attention at equal bytes.
    """
    check_writable(output)
    from rich.console import Console

    from eigencache.api import mla
    from eigencache.cli.progress import progress_bar
    from eigencache.corpora.resolve import read_text
    from eigencache.report.mla import equal_bytes_table, latent_table
    from eigencache.report.quality.sweep_table import safety_table, sweep_table

    with progress_bar(model) as on_progress:
        measured = mla(
            model,
            text=read_text(text),
            calibration_text=read_text(calibration_text),
            against=against,
            scope=scope.value,
            tokens=tokens,
            calibration_tokens=calibration_tokens,
            max_length=max_length,
            force=force,
            device=device,
            dtype=dtype,
            batch_size=batch_size,
            memory=in_bytes(memory),
            seed=seed,
            on_progress=on_progress,
        )
    if output:
        measured.sweep.save(output)
    console = Console()
    console.print(latent_table(model, measured.caches))
    console.print(sweep_table(measured.sweep))
    console.print(safety_table(measured.sweep))
    if measured.against:
        console.print(equal_bytes_table([measured.sweep, measured.against]))
    print_written(output)
