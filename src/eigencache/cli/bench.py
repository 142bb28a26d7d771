"""`eigencache bench [MODEL…]`: methods at equal loss, all bytes counted."""

from pathlib import Path
from typing import Annotated

import typer

from eigencache.cli.options import (
    BatchSize,
    CalibrationText,
    Device,
    Dtype,
    Force,
    Memory,
    Text,
    check_folder,
    in_bytes,
    keeping,
    length_numbers,
    positive_numbers,
    print_written,
    task_names,
    unique,
)

EXAMPLES = """
[b]Examples[/b]\n
  eigencache bench ref-llama --methods eigen,kvtc,int --lengths 512 --seeds 1\n
  eigencache bench --output leaderboard\n
  eigencache bench ref-qwen2 --methods eigen,kvtc-no-window --points 0.1,0.3,1 --tasks copy,recall --prompts 8\n
  eigencache bench meta-llama/Llama-3.2-1B --text wikitext2 --lengths 2048\n
  eigencache bench ref-llama --methods eigen,kvtc,kvtc-sinks --step 16\n
"""


def run(
    models: Annotated[list[str] | None, typer.Argument(help="Models; default: the four bundled ones.")] = None,
    methods: Annotated[
        str | None, typer.Option("--methods", help="Methods to compare, such as eigen,kvtc,int; default: all.")
    ] = None,
    points: Annotated[
        str | None,
        typer.Option("--points", help="Rates (bits per value) to test for variable-rate methods; default: 0.03 to 4."),
    ] = None,
    lengths: Annotated[
        str, typer.Option("--lengths", help="Sequence lengths in tokens; the last tokens are scored.")
    ] = "512,2048",
    scored: Annotated[int, typer.Option("--scored", min=2, help="Tokens at the end of a sequence that are scored.")] = 128,
    step: Annotated[
        int,
        typer.Option(
            "--step", min=0, help="Scored tokens read at a time, with all earlier tokens compressed; 0 reads all at once."
        ),
    ] = 0,
    text: Text = "stdlib:held-out",
    tokens: Annotated[
        int | None,
        typer.Option("--tokens", min=1, help="Tokens of the held-out text; default: 64 sequences of every length."),
    ] = None,
    calibration_text: CalibrationText = "stdlib",
    calibration_tokens: Annotated[
        int, typer.Option("--calibration-tokens", min=1, help="Calibration tokens per seed.")
    ] = 65_536,
    seeds: Annotated[
        int,
        typer.Option(
            "--seeds",
            min=1,
            help="Number of calibrations, each on another random draw of calibration sequences; draws overlap.",
        ),
    ] = 3,
    tasks: Annotated[str, typer.Option("--tasks", help="Retrieval tasks, such as copy,recall; or none.")] = "none",
    prompts: Annotated[int, typer.Option("--prompts", min=0, help="Prompts to generate from; 0 for none.")] = 0,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder for README.md, bench.html, plots and JSON.")
    ] = None,
    force: Force = False,
    device: Device = None,
    dtype: Dtype = None,
    batch_size: BatchSize = 8,
    memory: Memory = None,
) -> None:
    """Compare methods by the bytes they hold at equal loss through the cache, with intervals.

    With --output, an interrupted run resumes when it is started again; one method at most is measured anew.
    """
    if output:
        from eigencache.report.core.drawing import require

        check_folder(output)
        require("matplotlib")
    import shlex
    import sys

    from rich.console import Console

    from eigencache.api import bench
    from eigencache.cli.progress import progress_bar
    from eigencache.corpora.resolve import read_text
    from eigencache.inputs import check_names
    from eigencache.models.sources import BUNDLED
    from eigencache.report.bench.page import against_tables, file_name, tables_of, write_bench
    from eigencache.studies.bench.context import RATES
    from eigencache.studies.bench.methods import chosen_methods
    from eigencache.studies.bench.run import BenchSettings

    settings = BenchSettings(
        methods=tuple(unique(chosen_methods(methods))),
        rates=RATES if points is None else positive_numbers("--points", points),
        seeds=tuple(range(seeds)),
        scored=scored,
        step=step,
        tasks=task_names(tasks) or (),
        prompts=prompts,
    )
    names = unique(models or BUNDLED)
    check_names(names)
    whole, source, calibration_source = length_numbers(lengths), read_text(text), read_text(calibration_text)
    console, records = Console(), []
    for model in names:
        partial = output / f"{file_name(model)}.partial" if output else None
        with keeping(partial), progress_bar(model) as on_progress:
            records.append(
                bench(
                    model,
                    text=source,
                    calibration_text=calibration_source,
                    settings=settings,
                    lengths=whole,
                    tokens=tokens,
                    calibration_tokens=calibration_tokens,
                    force=force,
                    partial=partial,
                    device=device,
                    dtype=dtype,
                    batch_size=batch_size,
                    memory=in_bytes(memory),
                    on_progress=on_progress,
                )
            )
        for table in tables_of(records[-1]):
            console.print(table)
    for table in against_tables(records) if len(records) > 1 else ():
        console.print(table)
    if output:
        print_written(*write_bench(records, output, shlex.join(["eigencache", *sys.argv[1:]])))
        for record in records:
            (output / f"{file_name(record.model.name)}.partial").unlink(missing_ok=True)
