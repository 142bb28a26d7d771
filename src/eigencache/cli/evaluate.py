"""`eigencache evaluate MODEL`: one way of compressing, judged by what the model says through its cache."""

from collections.abc import Collection
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
    Seed,
    Text,
    check_folder,
    check_writable,
    rank_numbers,
)
from eigencache.cli.probe import ScopeName
from eigencache.cli.sweep import Bits, MetricName, OneFrame, TargetName
from eigencache.errors import CodecError, StatisticsError

EXAMPLES = """
[b]Examples[/b]\n
  eigencache evaluate ref-llama --target kv --ranks 16,24\n
  eigencache evaluate ref-deepseek --target latent --ranks 24 --metric fisher --output mla.json\n
  eigencache evaluate ref-llama --target v --ranks 16 --window 64 --tasks copy,needle --lengths 256,1024\n
  eigencache evaluate meta-llama/Llama-3.2-1B --text wikitext2 --max-length 2048 --target k --ranks 32\n
  eigencache evaluate ref-llama --target kv --ranks 24 --bits 8 --save-codec kv24\n
  eigencache evaluate ref-llama --codec kv24 --tokens 8192
"""
_FITTING = (
    "target", "ranks", "scope", "frame", "metric", "bits", "calibration_text", "calibration_tokens", "save_to"
)  # fmt: skip


def run(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="A bundled model, a folder, a .gguf file or a hub name.")],
    target: Annotated[TargetName | None, typer.Option("--target", help="Default: kv, or latent for MLA.")] = None,
    ranks: Annotated[str | None, typer.Option("--ranks", help="Such as 16,24; default: half of the width.")] = None,
    scope: Annotated[ScopeName, typer.Option("--scope", help="One basis per head, per layer, or for all layers.")] = (
        ScopeName.head
    ),
    frame: Annotated[OneFrame, typer.Option("--frame", help="Keys before or after rotation.")] = OneFrame.pre,
    metric: Annotated[MetricName, typer.Option("--metric", help="What an error is weighed with.")] = MetricName.fisher,
    bits: Annotated[Bits, typer.Option("--bits", help="Bits of a stored coefficient.")] = Bits.sixteen,
    text: Text = "stdlib:held-out",
    tokens: Annotated[int, typer.Option("--tokens", min=1, help="Tokens of the held-out text at most.")] = 32_768,
    max_length: Annotated[int, typer.Option("--max-length", min=16, help="Tokens per sequence.")] = 1024,
    prefix: Annotated[int | None, typer.Option("--prefix", min=8, help="Tokens held encoded; default half.")] = None,
    chunk: Annotated[
        int | None, typer.Option("--chunk", min=1, help="Tokens read at a time in the second protocol; default an eighth.")
    ] = None,
    window: Annotated[int, typer.Option("--window", min=0, help="Most recent tokens that stay as they are in it.")] = 0,
    prompts: Annotated[int, typer.Option("--prompts", min=0, help="Prompts to generate from; 0 for none.")] = 8,
    tasks: Annotated[
        str | None,
        typer.Option(
            "--tasks", help="copy,induction,recall,needle,variable tracking,common words; all by default; or none."
        ),
    ] = None,
    lengths: Annotated[str, typer.Option("--lengths", help="Context lengths of the tasks.")] = "256",
    calibration_text: CalibrationText = "stdlib",
    calibration_tokens: CalibrationTokens = 131_072,
    save_to: Annotated[
        Path | None, typer.Option("--save-codec", help="Save the codec in this folder, for --codec and lm-eval; one rank.")
    ] = None,
    codec: Annotated[Path | None, typer.Option("--codec", help="A saved codec of this model: nothing is fitted.")] = None,
    force: Force = False,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write the record as JSON.")] = None,
    device: Device = None,
    dtype: Dtype = None,
    batch_size: BatchSize = 8,
    seed: Seed = 0,
) -> None:
    """Evaluate a way of compressing: likelihood through the cache, generation, retrieval and bytes.

    With --output, an interrupted run goes on where it stopped when it is started again.
    """
    check_writable(output)
    numbers = rank_numbers(ranks)
    if codec and (unread := _given(context, _FITTING)):
        raise CodecError(f"{', '.join(unread)}: for fitting a codec, --codec {codec} is fitted: leave out one of the two")
    if save_to:
        check_folder(save_to.parent)
        if numbers and len(numbers) > 1:
            raise StatisticsError(f"--ranks {ranks}: --save-codec {save_to} saves one codec: give one rank")
    from rich.console import Console

    from eigencache.cli.measuring import load_with_text, pack_with_progress
    from eigencache.cli.options import length_numbers
    from eigencache.cli.progress import progress_bar
    from eigencache.codec.pca import CoefficientBits
    from eigencache.codec.saved.folder import check_replaceable, load_codec, save_codec
    from eigencache.evaluate.prefix import Window
    from eigencache.evaluate.tasks import task_named
    from eigencache.fitting.pca import PCACalibration, PCASettings
    from eigencache.fitting.provenance import fitting_of
    from eigencache.models.codec_check import codec_for
    from eigencache.records.quality import ReadingProtocol
    from eigencache.report.quality.evaluation import evaluation_tables
    from eigencache.studies.evaluation import evaluate_codecs
    from eigencache.studies.sweep import Plan, check_plans, codecs_of

    context_lengths = length_numbers(lengths)
    chosen = None if tasks is None else () if tasks == "none" else tuple(part.strip() for part in tasks.split(","))
    for task in chosen or ():
        task_named(task)
    widths: dict[Bits, CoefficientBits] = {Bits.sixteen: 16, Bits.eight: 8, Bits.four: 4}
    saved = load_codec(codec) if codec else None
    if save_to:
        check_replaceable(save_to)
    loaded, held_out = load_with_text(model, text=text, tokens=tokens, max_length=max_length, device=device, dtype=dtype)
    wanted = target.value if target else "latent" if loaded.geometry.mla else "kv"
    plan = Plan(PCASettings(wanted, scope.value, frame.value, metric.value), widths[bits], numbers, shares=(0.5,))
    partial = output.with_name(f"{output.name}.partial") if output else None
    fitting = None
    if saved:
        own = codec_for(saved, loaded)
    else:
        check_plans(loaded, [plan])
        fitted_on = pack_with_progress(loaded, calibration_text, calibration_tokens, min(512, max_length))
    with progress_bar(model) as on_progress:
        if saved:
            calibration, codecs = saved, {own.name: own}
        else:
            calibration = PCACalibration(loaded, fitted_on, scopes=(scope.value,), seed=seed, on_progress=on_progress)
            codecs = fitted = codecs_of(calibration, plan)
            if save_to:
                fitting = fitting_of(next(iter(fitted.values())), plan.settings, calibration)
        record = evaluate_codecs(
            loaded,
            held_out,
            calibration,
            codecs,
            (
                ReadingProtocol(kind="prefix", length=prefix or max_length // 2),
                ReadingProtocol(kind="chunked", length=chunk or max_length // 8, window=window),
            ),
            prompts=prompts,
            tasks=chosen,
            lengths=context_lengths,
            window=Window(window),
            batch_size=batch_size,
            seed=seed,
            force=force,
            partial=partial,
            on_progress=on_progress,
        )
    if output:
        record.save(output)
    if partial:
        partial.unlink(missing_ok=True)
    if save_to and fitting:
        save_codec(save_to, next(iter(codecs.values())), *fitting)
    console = Console()
    for table in evaluation_tables(record):
        console.print(table)
    for path in filter(None, (output, save_to)):
        console.print(f"written: {path}", markup=False, highlight=False)


def _given(context: typer.Context, names: Collection[str]) -> list[str]:
    """Which of these parameters stand on the command line, as they are spelled there."""
    spelled = {param.name: param.opts[0] for param in context.command.params}
    sources = {name: context.get_parameter_source(name) for name in names}
    return [spelled[name] for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"]
