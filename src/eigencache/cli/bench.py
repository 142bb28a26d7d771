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
    Text,
    check_folder,
    length_numbers,
    positive_numbers,
    unique,
)

_SEQUENCES = 64  # fewer leave a loss of 0.01 nats to chance
EXAMPLES = """
[b]Examples[/b]\n
  eigencache bench ref-llama --methods eigen,kvtc,int --lengths 512 --seeds 1\n
  eigencache bench --output docs/leaderboard\n
  eigencache bench ref-qwen2 --methods eigen,kvtc-no-window --points 0.1,0.3,1 --tasks copy,recall --prompts 8\n
  eigencache bench meta-llama/Llama-3.2-1B --text wikitext2 --lengths 2048\n
  eigencache bench ref-llama --methods eigen,kvtc,kvtc-sinks --step 16\n
  eigencache bench --speed llama-3-8b --contexts 4096,32768 --output speed
"""


def run(
    models: Annotated[list[str] | None, typer.Argument(help="Models; default: the four bundled ones.")] = None,
    methods: Annotated[str | None, typer.Option("--methods", help="Such as eigen,kvtc,int; default: all.")] = None,
    points: Annotated[
        str | None, typer.Option("--points", help="Bits per value of methods that take any; default: 0.03 to 4.")
    ] = None,
    lengths: Annotated[
        str, typer.Option("--lengths", help="Tokens of a sequence; the last of them are scored.")
    ] = "512,2048",
    scored: Annotated[int, typer.Option("--scored", min=2, help="Tokens at the end of a sequence that are scored.")] = 128,
    step: Annotated[
        int,
        typer.Option(
            "--step", min=0, help="Of the scored tokens so many are read at a time, all before them held; 0: all at once."
        ),
    ] = 0,
    text: Text = "stdlib:held-out",
    tokens: Annotated[
        int | None,
        typer.Option("--tokens", min=1, help="Tokens of the held-out text; default: 64 sequences of every length."),
    ] = None,
    calibration_text: CalibrationText = "stdlib",
    calibration_tokens: Annotated[int, typer.Option("--calibration-tokens", min=1, help="Tokens of every seed.")] = 65_536,
    seeds: Annotated[int, typer.Option("--seeds", min=1, help="Calibrations, each on other sequences of its text.")] = 3,
    tasks: Annotated[str, typer.Option("--tasks", help="Retrieval tasks, such as copy,recall; or none.")] = "none",
    prompts: Annotated[int, typer.Option("--prompts", min=0, help="Prompts to generate from; 0 for none.")] = 0,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder for README.md, bench.html, plots, JSON.")
    ] = None,
    speed: Annotated[
        bool, typer.Option("--speed", help="Time the live cache beside its peers; MODEL is then an attention geometry.")
    ] = False,
    contexts: Annotated[str, typer.Option("--contexts", help="Of --speed: tokens held.")] = "1024,4096,16384,32768",
    batches: Annotated[str, typer.Option("--batches", help="Of --speed: sequences at a time.")] = "1",
    live_bits: Annotated[str, typer.Option("--live-bits", help="Of --speed: per value; 2.5, 3.125, 4, 8.")] = "3.125,4",
    generated: Annotated[
        int,
        typer.Option("--generated", min=0, help="Of --speed: tokens of a whole generation, up to 16,384 held; 0 for none."),
    ] = 65,
    prefill: Annotated[int, typer.Option("--prefill", min=0, help="Of --speed: tokens of a prompt; 0 for none.")] = 8192,
    chunk: Annotated[
        int, typer.Option("--chunk", min=0, help="Of --speed: tokens of the prompt read at a time as well; 0 for none.")
    ] = 512,
    layers: Annotated[int, typer.Option("--layers", min=1, help="Of --speed: layers of the model.")] = 1,
    repeats: Annotated[int, typer.Option("--repeats", min=1, help="Of --speed: medians are of so many.")] = 7,
    force: Force = False,
    device: Device = None,
    dtype: Dtype = None,
    batch_size: BatchSize = 8,
) -> None:
    """Compare methods by the bytes they hold at equal loss through the cache, with intervals.

    With --output, an interrupted run goes on where it stopped when it is started again.
    """
    if output:
        from eigencache.report.core.drawing import require

        check_folder(output)
        require("matplotlib")
    if speed:
        from eigencache.cli.bench_speed import run_speed

        shape = (models, contexts, batches, live_bits, generated, prefill, chunk, layers, repeats)
        return run_speed(*shape, output, device, dtype)
    import shlex
    import sys

    from rich.console import Console

    from eigencache.calibration.calibration_set import calibration_length
    from eigencache.cli.measuring import load_with_text, pack_with_progress
    from eigencache.cli.progress import progress_bar
    from eigencache.errors import CorpusError
    from eigencache.evaluate.tasks import task_named
    from eigencache.models.load import BUNDLED
    from eigencache.report.bench.page import against_tables, file_name, tables_of, write_bench
    from eigencache.studies.bench.context import RATES
    from eigencache.studies.bench.methods import chosen_methods
    from eigencache.studies.bench.run import BenchSettings, bench_model

    wanted = () if tasks == "none" else tuple(part.strip() for part in tasks.split(","))
    for task in wanted:
        task_named(task)
    whole = length_numbers(lengths)
    if short := [length for length in whole if length < scored + 8]:
        raise CorpusError(f"--lengths {short[0]}: the last {scored} tokens are scored, at least 8 more have to be held")
    settings = BenchSettings(
        methods=tuple(unique(chosen_methods(methods))),
        rates=RATES if points is None else positive_numbers("--points", points),
        seeds=tuple(range(seeds)),
        scored=scored,
        step=step,
        tasks=wanted,
        prompts=prompts,
        batch_size=batch_size,
    )
    console, records = Console(), []
    for model in unique(models or BUNDLED):
        loaded, calibration = load_with_text(
            model,
            text=calibration_text,
            tokens=calibration_tokens * min(seeds, 3),
            length_of=calibration_length,
            device=device,
            dtype=dtype,
        )
        held_out = {
            length - scored: pack_with_progress(loaded, text, tokens or _SEQUENCES * length, length) for length in whole
        }
        partial = output / f"{file_name(loaded.name)}.partial" if output else None
        with progress_bar(model) as on_progress:
            records.append(
                bench_model(
                    loaded,
                    calibration,
                    calibration_tokens,
                    held_out,
                    settings,
                    force=force,
                    partial=partial,
                    on_progress=on_progress,
                )
            )
        for table in tables_of(records[-1]):
            console.print(table)
    for table in against_tables(records) if len(records) > 1 else ():
        console.print(table)
    if output:
        for path in write_bench(records, output, shlex.join(["eigencache", *sys.argv[1:]])):
            console.print(f"written: {path}", markup=False, highlight=False)
        for record in records:
            (output / f"{file_name(record.model.name)}.partial").unlink(missing_ok=True)
