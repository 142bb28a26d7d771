"""`eigencache probe MODEL`: measure the spectra of a model's cache, and write a table, JSON and a plot."""

from enum import StrEnum
from typing import Annotated

import typer

from eigencache.cli.options import (
    BatchSize,
    Device,
    Dtype,
    FrameName,
    MaxLength,
    Memory,
    OutputJson,
    Plot,
    ScopeName,
    Seed,
    Text,
    Tokens,
    check_plot,
    check_writable,
    in_bytes,
    layer_numbers,
    print_written,
)

EXAMPLES = """
[b]Examples[/b]\n
  eigencache probe ref-llama\n
  eigencache probe Qwen/Qwen2.5-0.5B --text wikitext2 --output qwen.json --plot qwen.png\n
  eigencache probe ref-llama --layers-table\n
  eigencache probe ref-gpt2 --layers 0,3,5 --scope head --tokens 20000\n
  eigencache probe ref-llama --view classic\n
  eigencache probe smollm2 --view sinks --tokens 16384
"""


class View(StrEnum):
    """What the table on the terminal shows."""

    honest = "honest"
    classic = "classic"
    spread = "spread"
    sinks = "sinks"


def run(
    model: Annotated[
        str,
        typer.Argument(help="smollm2, ref-gpt2, ref-llama, ref-qwen2, ref-deepseek, a folder, a .gguf file or a hub name."),
    ],
    layers: Annotated[str | None, typer.Option("--layers", help="Layers to use, such as 0,6,12; default: all.")] = None,
    tokens: Tokens = 131_072,
    text: Text = "stdlib",
    frame: Annotated[FrameName, typer.Option("--frame", help="Keys before rotation, after it, or both.")] = FrameName.both,
    scope: Annotated[
        list[ScopeName] | None,
        typer.Option(
            "--scope",
            help="Scope of the spectra; can be repeated; default: all three. If all is the only one, its sample is larger.",
        ),
    ] = None,
    view: Annotated[
        View,
        typer.Option(
            "--view",
            help="Table to print: honest (statistics that the sample supports), classic (the original probe), spread (of "
            "the raw dimensions), or sinks (attention to the first tokens, norms and gradient energy; runs backward passes "
            "over 4,096 tokens).",
        ),
    ] = View.honest,
    layers_table: Annotated[bool, typer.Option("--layers-table", help="Also print all statistics of every layer.")] = False,
    output: OutputJson = None,
    plot: Plot = None,
    max_length: MaxLength = None,
    tokenizer: Annotated[str | None, typer.Option("--tokenizer", help="Take the tokenizer from another model.")] = None,
    device: Device = None,
    dtype: Dtype = None,
    batch_size: BatchSize = 8,
    seed: Seed = 0,
    memory: Memory = None,
) -> None:
    """Measure the spectra of cached keys, values and latents: effective ranks, energies and their statistical support."""
    check_writable(output)
    check_plot(plot)
    numbers = layer_numbers(layers)
    from rich.console import Console

    from eigencache.api import probe
    from eigencache.cli.progress import progress_bar
    from eigencache.corpora.resolve import read_text
    from eigencache.records.base import SCOPES, Scope
    from eigencache.report.core.drawing import save_figure
    from eigencache.report.probe.comparison import classic_table
    from eigencache.report.probe.plots import plot_probe, plot_spread
    from eigencache.report.probe.sinks import plot_sinks, sinks_table
    from eigencache.report.probe.spread_table import spread_table
    from eigencache.report.probe.summary import probe_summary
    from eigencache.report.probe.tables import geometry_lines, probe_table
    from eigencache.studies.probe import ProbeSettings

    scopes: tuple[Scope, ...] = tuple(one for one in SCOPES if scope is None or ScopeName(one) in scope)
    with progress_bar(model) as on_progress:
        record = probe(
            model,
            tokenizer,
            read_text(text),
            tokens=tokens,
            max_length=max_length,
            settings=ProbeSettings(numbers, frame.value, scopes, gradients=view is View.sinks),
            device=device,
            dtype=dtype,
            batch_size=batch_size,
            seed=seed,
            memory=in_bytes(memory),
            on_progress=on_progress,
        ).record
    if output:
        record.save(output)
    if plot:
        save_figure({View.spread: plot_spread, View.sinks: plot_sinks}.get(view, plot_probe)(record), plot)
    console = Console()
    for line in geometry_lines(record):
        console.print(line, markup=False, highlight=False)
    tables = {
        View.honest: probe_summary,
        View.classic: classic_table,
        View.spread: spread_table,
        View.sinks: sinks_table,
    }
    console.print(tables[view](record))
    if layers_table:
        console.print(probe_table(record))
    print_written(output, plot)
