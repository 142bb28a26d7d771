"""`eigencache probe MODEL`: the spectra of one model's cache, as a table, JSON and a plot."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from eigencache.cli.options import (
    BatchSize,
    Device,
    Dtype,
    MaxLength,
    Seed,
    Text,
    Tokens,
    check_plot,
    check_writable,
    layer_numbers,
)

EXAMPLES = """
[b]Examples[/b]\n
  eigencache probe ref-llama\n
  eigencache probe Qwen/Qwen2.5-0.5B --text wikitext2 --output qwen.json --plot qwen.png\n
  eigencache probe ref-llama --layers-table\n
  eigencache probe ref-gpt2 --layers 0,3,5 --scope head --tokens 20000\n
  eigencache probe ref-llama --view classic
"""


class FrameName(StrEnum):
    """Which frames of the keys to print and record."""

    pre = "pre"
    post = "post"
    both = "both"


class ScopeName(StrEnum):
    """What a spectrum is taken over."""

    head = "head"
    layer = "layer"
    all = "all"


class View(StrEnum):
    """What the table on the terminal shows."""

    honest = "honest"
    classic = "classic"
    spread = "spread"


def run(
    model: Annotated[
        str, typer.Argument(help="ref-gpt2, ref-llama, ref-qwen2, ref-deepseek, a folder, a .gguf file or a hub name.")
    ],
    layers: Annotated[str | None, typer.Option("--layers", help="Only these layers, such as 0,6,12.")] = None,
    tokens: Tokens = 131_072,
    text: Text = "stdlib",
    frame: Annotated[FrameName, typer.Option("--frame", help="Keys before rotation, after it, or both.")] = FrameName.both,
    scope: Annotated[
        list[ScopeName] | None, typer.Option("--scope", help="May be given more than once; default: all three.")
    ] = None,
    view: Annotated[View, typer.Option("--view", help="honest, classic (the historic figures) or spread.")] = View.honest,
    layers_table: Annotated[bool, typer.Option("--layers-table", help="Also print all statistics of every layer.")] = False,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write the record as JSON.")] = None,
    plot: Annotated[Path | None, typer.Option("--plot", help="Write a plot (.png, .svg, .pdf).")] = None,
    max_length: MaxLength = None,
    tokenizer: Annotated[str | None, typer.Option("--tokenizer", help="Take the tokenizer from another model.")] = None,
    device: Device = None,
    dtype: Dtype = None,
    batch_size: BatchSize = 8,
    seed: Seed = 0,
    memory: Annotated[
        float, typer.Option("--memory", min=0.001, help="GiB for moments; scopes that need more are left out.")
    ] = 4.0,
) -> None:
    """Probe what a model caches: how many directions of keys, values and latents matter, and what the data support."""
    check_writable(output)
    check_plot(plot)
    numbers = layer_numbers(layers)
    from rich.console import Console

    from eigencache.cli.measuring import measure_model
    from eigencache.records.base import SCOPES, Scope
    from eigencache.report.core.drawing import save_figure
    from eigencache.report.probe.comparison import classic_table
    from eigencache.report.probe.plots import plot_probe, plot_spread
    from eigencache.report.probe.spread_table import spread_table
    from eigencache.report.probe.summary import probe_summary
    from eigencache.report.probe.tables import geometry_lines, probe_table
    from eigencache.studies.probe import ProbeSettings

    scopes: tuple[Scope, ...] = tuple(one for one in SCOPES if scope is None or ScopeName(one) in scope)
    settings = ProbeSettings(numbers, frame.value, scopes, batch_size, seed, int(memory * 2**30))
    record = measure_model(
        model, settings, text=text, tokens=tokens, max_length=max_length, tokenizer=tokenizer, device=device, dtype=dtype
    )
    if output:
        record.save(output)
    if plot:
        save_figure((plot_spread if view is View.spread else plot_probe)(record), plot)
    console = Console()
    for line in geometry_lines(record):
        console.print(line, markup=False, highlight=False)
    console.print({View.honest: probe_summary, View.classic: classic_table, View.spread: spread_table}[view](record))
    if layers_table:
        console.print(probe_table(record))
    for path in filter(None, (output, plot)):
        console.print(f"written: {path}", markup=False, highlight=False)
