"""`eigencache evaluate MODEL`: measure one compression setting through the cache."""

from pathlib import Path
from typing import Annotated

import typer

from eigencache.cli.options import (
    BatchSize,
    Bits,
    CalibrationText,
    CalibrationTokens,
    CoefficientBits,
    Device,
    Dtype,
    Force,
    Frame,
    HeldOutLength,
    HeldOutTokens,
    Memory,
    Metric,
    Model,
    OneFrame,
    OutputJson,
    Prefix,
    Scope,
    ScopeName,
    Seed,
    TargetName,
    Text,
    check_folder,
    check_writable,
    finish,
    given,
    in_bytes,
    keeping,
    length_numbers,
    partial_of,
    print_written,
    rank_numbers,
    task_names,
)
from eigencache.errors import CodecError

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
    model: Model,
    target: Annotated[
        TargetName | None, typer.Option("--target", help="Tensor to compress; default: kv, or latent for MLA.")
    ] = None,
    ranks: Annotated[
        str | None, typer.Option("--ranks", help="Ranks to evaluate, such as 16,24; default: half of the width.")
    ] = None,
    scope: Scope = ScopeName.head,
    frame: Frame = OneFrame.pre,
    metric: Metric = "fisher",
    bits: CoefficientBits = Bits.sixteen,
    text: Text = "stdlib:held-out",
    tokens: HeldOutTokens = 32_768,
    max_length: HeldOutLength = 1024,
    prefix: Prefix = None,
    chunk: Annotated[
        int | None,
        typer.Option(
            "--chunk", min=1, help="Tokens read at a time in the chunked protocol; default: an eighth of a sequence."
        ),
    ] = None,
    window: Annotated[int, typer.Option("--window", min=0, help="Uncompressed recent tokens in the chunked protocol.")] = 0,
    prompts: Annotated[int, typer.Option("--prompts", min=0, help="Prompts to generate from; 0 for none.")] = 8,
    tasks: Annotated[
        str | None,
        typer.Option(
            "--tasks",
            help="Retrieval tasks: copy,induction,recall,needle,variable tracking,common words; default: all; or none.",
        ),
    ] = None,
    lengths: Annotated[str, typer.Option("--lengths", help="Context lengths of the tasks, in tokens.")] = "256",
    calibration_text: CalibrationText = "stdlib",
    calibration_tokens: CalibrationTokens = 131_072,
    save_to: Annotated[
        Path | None, typer.Option("--save-codec", help="Folder to save the fitted codec in; needs a single rank.")
    ] = None,
    codec: Annotated[
        Path | None,
        typer.Option(
            "--codec",
            help="Folder of a saved codec of this model; nothing is fitted. A live codec is in its subfolder `live`.",
        ),
    ] = None,
    force: Force = False,
    output: OutputJson = None,
    device: Device = None,
    dtype: Dtype = None,
    batch_size: BatchSize = 8,
    seed: Seed = 0,
    memory: Memory = None,
) -> None:
    """Evaluate one compression setting: likelihood through the cache, generation, retrieval and bytes.

    With --output, an interrupted run resumes when it is started again.
    """
    check_writable(output)
    numbers = rank_numbers(ranks)
    if codec and (unread := given(context, _FITTING)):
        raise CodecError(f"{', '.join(unread)} cannot be combined with --codec, because a saved codec is fitted already.")
    if save_to:
        check_folder(save_to.parent)
    from rich.console import Console

    from eigencache.api import evaluate
    from eigencache.cli.progress import progress_bar
    from eigencache.codec.pca import CoefficientBits as CodecBits
    from eigencache.codec.saved.folder import LIVE
    from eigencache.corpora.resolve import read_text
    from eigencache.fitting.pca_settings import PCASettings
    from eigencache.report.quality.evaluation import evaluation_tables

    widths: dict[Bits, CodecBits] = {Bits.sixteen: 16, Bits.eight: 8, Bits.four: 4}
    with keeping(partial_of(output)), progress_bar(model) as on_progress:
        record = evaluate(
            model,
            text=read_text(text),
            calibration_text=calibration_text if codec else read_text(calibration_text),  # a saved codec needs none
            codec=codec,
            settings=PCASettings("v", scope.value, frame.value, metric),
            target=target.value if target else None,
            ranks=numbers,
            bits=widths[bits],
            tokens=tokens,
            calibration_tokens=calibration_tokens,
            max_length=max_length,
            prefix=prefix,
            chunk=chunk,
            window=window,
            prompts=prompts,
            tasks=task_names(tasks),
            lengths=length_numbers(lengths),
            save_to=save_to,
            force=force,
            partial=partial_of(output),
            device=device,
            dtype=dtype,
            batch_size=batch_size,
            memory=in_bytes(memory),
            seed=seed,
            on_progress=on_progress,
        )
    if output:
        record.save(output)
    finish(output)
    console = Console()
    for table in evaluation_tables(record):
        console.print(table)
    if codec and (codec / LIVE).is_dir():
        note = f"The live codec of {codec} was not evaluated. For it, give --codec {codec / LIVE}"
        console.print(note, markup=False, highlight=False, soft_wrap=True)
    print_written(output, save_to)
