"""`eigencache speed [GEOMETRY…]`: time `CompressedCache` and other caches, with random weights."""

from pathlib import Path
from typing import Annotated

import typer

from eigencache.cli.options import check_folder, length_numbers, positive_numbers, print_written, unique

EXAMPLES = """
[b]Examples[/b]\n
  eigencache speed\n
  eigencache speed llama-3-8b --contexts 4096,32768 --output speed\n
  eigencache speed qwen2.5-7b --device cuda --batches 1,8 --generated 0\n
"""


def run(
    geometries: Annotated[
        list[str] | None, typer.Argument(help="Attention geometries of large models; default: all that are known.")
    ] = None,
    contexts: Annotated[str, typer.Option("--contexts", help="Tokens held by the cache.")] = "1024,4096,16384,32768",
    batches: Annotated[str, typer.Option("--batches", help="Sequences at a time.")] = "1",
    rates: Annotated[str, typer.Option("--live-bits", help="Bits per packed value: 2.5, 3.125, 4 or 8.")] = "3.125,4",
    generated: Annotated[
        int, typer.Option("--generated", min=0, help="Tokens of a generation, up to 16,384 tokens held; 0 for none.")
    ] = 65,
    prefill: Annotated[int, typer.Option("--prefill", min=0, help="Tokens of a prompt; 0 for none.")] = 8192,
    chunk: Annotated[
        int, typer.Option("--chunk", min=0, help="Tokens read at a time in a chunked prefill; 0 for none.")
    ] = 512,
    layers: Annotated[int, typer.Option("--layers", min=1, help="Layers of the model.")] = 1,
    repeats: Annotated[
        int, typer.Option("--repeats", min=1, help="Timed repetitions per measurement; the median is reported.")
    ] = 7,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Folder for README.md, a plot and JSON.")] = None,
    device: Annotated[
        str | None, typer.Option("--device", help="cpu, cuda or cuda:1; default: cuda if available, otherwise cpu.")
    ] = None,
    dtype: Annotated[str, typer.Option("--dtype", help="float32, bfloat16 or float16.")] = "bfloat16",
) -> None:
    """Time the compressed cache and other caches: attention, decode steps, generation and prefill.

    All caches run in turn in every repetition, on attention geometries of large models with random weights.
    """
    if output:
        from eigencache.report.core.drawing import require

        check_folder(output)
        require("matplotlib")
    import shlex
    import sys

    from rich.console import Console

    from eigencache.api import speed
    from eigencache.cli.progress import progress_bar
    from eigencache.models.synthetic import GEOMETRIES
    from eigencache.report.speed import speed_tables, write_speed

    with progress_bar("speed") as on_progress:
        record = speed(
            unique(geometries or GEOMETRIES),
            contexts=length_numbers(contexts, "--contexts"),
            batches=length_numbers(batches, "--batches"),
            rates=positive_numbers("--live-bits", rates),
            generated=generated,
            prefill=prefill,
            chunk=chunk,
            layers=layers,
            repeats=repeats,
            device=device,
            dtype=dtype,
            on_progress=on_progress,
        )
    console = Console()
    for table in speed_tables(record):
        console.print(table)
    if output:
        print_written(*write_speed(record, output, shlex.join(["eigencache", *sys.argv[1:]])))
