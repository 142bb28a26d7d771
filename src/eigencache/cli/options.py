"""The options that several subcommands share, spelled and explained once."""

import sys
import tempfile
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from eigencache.errors import CorpusError, LayerError, OutputError, StatisticsError

Text = Annotated[
    str,
    typer.Option(
        "--text",
        help="A file, folder, glob, .jsonl, stdlib, stdlib:held-out, wikitext2 or hf:NAME[:CONFIG[:SPLIT]].",
    ),
]
Tokens = Annotated[int, typer.Option("--tokens", min=1, help="Tokens to use at most.")]
MaxLength = Annotated[
    int | None,
    typer.Option("--max-length", min=8, help="Tokens per sequence; default: 512, or the positions of the model if fewer."),
]
Device = Annotated[str | None, typer.Option("--device", help="cpu, cuda, cuda:1, mps, or auto to spread over devices.")]
Dtype = Annotated[str | None, typer.Option("--dtype", help="float32, bfloat16, float16, float64 or auto.")]
BatchSize = Annotated[int, typer.Option("--batch-size", min=1, help="Sequences per forward pass.")]
CalibrationText = Annotated[str, typer.Option("--calibration-text", help="Calibration text, which bases are fitted on.")]
CalibrationTokens = Annotated[
    int, typer.Option("--calibration-tokens", min=1, help="Tokens of the calibration text at most.")
]
Force = Annotated[bool, typer.Option("--force", help="Score a text that overlaps the calibration text as well.")]
Memory = Annotated[
    float | None,
    typer.Option("--memory", min=0.001, help="GiB the work may take beside the model; default: 60 % of what is free."),
]
Seed = Annotated[int, typer.Option("--seed", help="Seed of everything random.")]


class FrameName(StrEnum):
    """Frames of the keys to print and record."""

    pre = "pre"
    post = "post"
    both = "both"


class ScopeName(StrEnum):
    """What one spectrum or one basis is taken over."""

    head = "head"
    layer = "layer"
    all = "all"


class TargetName(StrEnum):
    """Tensor to compress; the others stay in 16 bits."""

    k = "k"
    v = "v"
    kv = "kv"
    latent = "latent"
    key_rope = "key_rope"


class OneFrame(StrEnum):
    """Keys before or after rotation."""

    pre = "pre"
    post = "post"


class Bits(StrEnum):
    """Bits of a stored coefficient."""

    sixteen = "16"
    eight = "8"
    four = "4"


Model = Annotated[str, typer.Argument(help="Bundled model, folder, .gguf file or hub name.")]
Models = Annotated[list[str] | None, typer.Argument(help="Models; default: the four bundled ones.")]
Scope = Annotated[ScopeName, typer.Option("--scope", help="One basis per head, per layer, or for all layers.")]
Frame = Annotated[OneFrame, typer.Option("--frame", help="Keys before or after rotation.")]
Metric = Annotated[
    str, typer.Option("--metric", help="Error metric: frobenius, attention, fisher, or one that you registered.")
]
CoefficientBits = Annotated[Bits, typer.Option("--bits", help="Bits of a stored coefficient.")]
HeldOutTokens = Annotated[int, typer.Option("--tokens", min=1, help="Tokens of the held-out text at most.")]
HeldOutLength = Annotated[int, typer.Option("--max-length", min=16, help="Tokens per sequence.")]
Prefix = Annotated[int | None, typer.Option("--prefix", min=8, help="Tokens held compressed; default: half of a sequence.")]
OutputJson = Annotated[Path | None, typer.Option("--output", "-o", help="Write the record as JSON.")]
Plot = Annotated[Path | None, typer.Option("--plot", help="Write a plot (.png, .svg, .pdf).")]


def layer_numbers(layers: str | None) -> tuple[int, ...] | None:
    """`0,6,12` → (0, 6, 12); None stays None. Raises `LayerError`."""
    if layers is None:
        return None
    try:
        return tuple(int(part) for part in layers.split(","))
    except ValueError as error:
        raise LayerError(f"--layers {layers}: give numbers with commas between them, such as 0,6,12") from error


def rank_numbers(ranks: str | None) -> tuple[int | None, ...] | None:
    """`8,16,full` → (8, 16, None); None stays None. Raises `StatisticsError`."""
    if ranks is None:
        return None
    try:
        numbers = tuple(None if part.strip() == "full" else int(part) for part in ranks.split(","))
    except ValueError as error:
        raise StatisticsError(
            f"--ranks {ranks}: give numbers with commas between them, or full, such as 8,16,full"
        ) from error
    if low := [number for number in numbers if number is not None and number < 1]:
        raise StatisticsError(f"--ranks {ranks}: {low[0]} is no rank; ranks begin at 1")
    return numbers


def length_numbers(lengths: str, option: str = "--lengths") -> tuple[int, ...]:
    """`256,1024` → (256, 1024). Raises `CorpusError` naming the option."""
    try:
        return tuple(int(part) for part in lengths.split(","))
    except ValueError as error:
        raise CorpusError(f"{option} {lengths}: give numbers with commas between them, such as 256,1024") from error


def positive_numbers(option: str, numbers: str) -> tuple[float, ...]:
    """`0.1,0.5` → (0.1, 0.5). Raises `StatisticsError` naming the option."""
    try:
        found = tuple(float(part) for part in numbers.split(","))
    except ValueError as error:
        raise StatisticsError(f"{option} {numbers}: give numbers with commas between them, such as 0.1,0.5") from error
    if not all(0 < number < float("inf") for number in found):
        raise StatisticsError(f"{option} {numbers}: every number must be above 0")
    return found


def check_writable(*paths: Path | None) -> None:
    """Raises `OutputError` before any work is done for a path that could not be written in the end."""
    for path in paths:
        if path is None:
            continue
        if path.is_dir():
            raise OutputError(f"{path}: is a folder: name a file")
        _check_folder(path.parent, path)


def check_plot(path: Path | None) -> None:
    """Raises `OutputError` where no figure could be written, before anything is measured."""
    if path is not None:
        from eigencache.report.core.drawing import check_format

        check_writable(path)
        check_format(path)


def check_folder(folder: Path) -> None:
    """Raises `OutputError` for a folder that could not be written to."""
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"{folder}: is a file: name a folder")
    _check_folder(folder, folder)


def _check_folder(folder: Path, path: Path) -> None:
    existing = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    if not existing.is_dir() or not _writable(existing):
        raise OutputError(f"{path}: cannot be written: {existing} is not a writable folder; choose another output")


def _writable(folder: Path) -> bool:
    try:
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def in_bytes(memory: float | None) -> int | None:
    """Return GiB as bytes; None stays None, the default."""
    return None if memory is None else int(memory * 2**30)


def unique(names: Iterable[str]) -> list[str]:
    """The names in order, each once."""
    return list(dict.fromkeys(names))


def partial_of(output: Path | None) -> Path | None:
    """Return the file or folder beside an output that keeps results while a command runs, so that it can be resumed."""
    return output.with_name(f"{output.name}.partial") if output else None


@contextmanager
def keeping(partial: Path | None) -> Iterator[None]:
    """Say where an interruption leaves what was measured, and how to go on from it."""
    try:
        yield
    except KeyboardInterrupt:
        if partial is not None and partial.exists():
            said = f"kept: {partial}: start the same command again to resume, or delete it"
            print(said, file=sys.stderr)
        raise


def finish(output: Path | None) -> None:
    """Remove what a command kept while it ran."""
    if partial := partial_of(output):
        partial.unlink(missing_ok=True)


def given(context: typer.Context, names: Collection[str]) -> list[str]:
    """Return the flags of those parameters that were given on the command line."""
    spelled = {param.name: param.opts[0] for param in context.command.params}
    sources = {name: context.get_parameter_source(name) for name in names}
    return [spelled[name] for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"]


def print_written(*paths: Path | None) -> None:
    """Print one line for every file that was written."""
    from rich.console import Console

    console = Console()
    for path in filter(None, paths):
        console.print(f"written: {path}", markup=False, highlight=False, soft_wrap=True)


def task_names(tasks: str | None) -> tuple[str, ...] | None:
    """`copy,recall` → ("copy", "recall"); `none` → (); None stays None."""
    if tasks is None:
        return None
    return () if tasks == "none" else tuple(part.strip() for part in tasks.split(","))
