"""`eigencache bench --speed`: the live cache beside its peers, on geometries of large models with random weights."""

import shlex
import sys
from pathlib import Path

import torch
from rich.console import Console

from eigencache.cli.options import length_numbers, positive_numbers, unique
from eigencache.cli.progress import progress_bar
from eigencache.errors import CorpusError, ModelError
from eigencache.evaluate.speed import SpeedSettings, measure_speed
from eigencache.models.load import check_device
from eigencache.models.synthetic import GEOMETRIES
from eigencache.report.speed import speed_tables, write_speed

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def run_speed(
    geometries: list[str] | None,
    contexts: str,
    batches: str,
    rates: str,
    generated: int,
    prefill: int,
    chunk: int,
    layers: int,
    repeats: int,
    output: Path | None,
    device: str | None,
    dtype: str | None,
) -> None:
    """Time, print, write. Raises `ModelError` for a geometry or dtype that there is not, `CorpusError` for no tokens."""
    if dtype not in (None, *_DTYPES):
        raise ModelError(f"--dtype {dtype}: choose one of {', '.join(_DTYPES)}")
    lengths, rows = length_numbers(contexts, "--contexts"), length_numbers(batches, "--batches")
    for option, numbers in (("--contexts", lengths), ("--batches", rows)):
        if min(numbers) < 1:
            raise CorpusError(f"{option} {min(numbers)}: must be 1 or more")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    check_device(device)
    settings = SpeedSettings(
        geometries=unique(geometries or GEOMETRIES),
        contexts=lengths,
        batches=rows,
        rates=positive_numbers("--live-bits", rates),
        generated=generated,
        prefill=prefill,
        chunk=chunk,
        layers=layers,
        repeats=repeats,
    )
    console = Console()
    with progress_bar("speed") as on_progress:
        record = measure_speed(settings, device, _DTYPES[dtype or "bfloat16"], on_progress)
    for table in speed_tables(record):
        console.print(table)
    for path in write_speed(record, output, shlex.join(["eigencache", *sys.argv[1:]])) if output else ():
        console.print(f"written: {path}", markup=False, highlight=False)
