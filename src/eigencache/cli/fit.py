"""`eigencache fit MODEL`: fit a codec for the cache of one model to a size or a loss budget."""

from pathlib import Path
from typing import Annotated

import typer

from eigencache.cli.options import (
    BatchSize,
    Device,
    Dtype,
    Memory,
    Metric,
    Model,
    Seed,
    Text,
    Tokens,
    check_folder,
    given,
    in_bytes,
    keeping,
    partial_of,
    print_written,
)

EXAMPLES = """
[b]Examples[/b]\n
  eigencache fit ref-llama -o llama-codec\n
  eigencache fit ref-qwen2 --bits 0.25 -o qwen-codec\n
  eigencache fit ref-deepseek --ratio 16 --no-text-prediction -o mla-codec\n
  eigencache fit meta-llama/Llama-3.2-1B --text wikitext2 --max-nll 0.005 --dtype bfloat16 -o llama-3-codec\n
  eigencache fit ref-llama --live -o llama-codec\n
  eigencache fit smollm2 --tokens 65536 --amortize 100000 -o smollm2-codec\n
  eigencache evaluate ref-llama --codec llama-codec
"""


_STORED = ("scope", "group", "amortize", "metric", "alpha", "text_prediction", "window", "kept_bits", "block")


def run(
    command: typer.Context,
    model: Model,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write the codec to.")],
    text: Text = "stdlib",
    tokens: Tokens = 131_072,
    max_length: Annotated[
        int | None,
        typer.Option("--max-length", min=8, help="Tokens per sequence; default: 512, or all learned positions of a model."),
    ] = None,
    bits: Annotated[
        float | None, typer.Option("--bits", help="Target size in bits per value, without side information.")
    ] = None,
    ratio: Annotated[
        float | None,
        typer.Option("--ratio", help="Target ratio: bytes of the 16-bit cache / bytes of the compressed cache."),
    ] = None,
    max_nll: Annotated[
        float | None,
        typer.Option("--max-nll", help="Budget in nats per token for both ΔNLL and KL; default without a size: 0.01."),
    ] = None,
    context: Annotated[
        int, typer.Option("--context", min=1, help="Context length at which --bits and --ratio are evaluated.")
    ] = 2048,
    scope: Annotated[
        str, typer.Option("--scope", help="What a basis covers: head, layer, groups (of layers) or joint (all layers).")
    ] = "groups",
    group: Annotated[
        int, typer.Option("--group", min=1, help="Layers of a group; each group is predicted from the one before.")
    ] = 3,
    amortize: Annotated[
        int,
        typer.Option(
            "--amortize",
            min=1,
            help="Stored tokens that share the side information; rows that save less are left out.",
        ),
    ] = 1_000_000,
    metric: Metric = "fisher",
    alpha: Annotated[
        float, typer.Option("--alpha", min=0, max=2, help="Exponent of the metric; 0 is the Frobenius norm.")
    ] = 0.75,
    text_prediction: Annotated[
        bool, typer.Option("--text-prediction/--no-text-prediction", help="Predict the cache from its tokens.")
    ] = True,
    sinks: Annotated[
        int | None,
        typer.Option(
            "--sinks",
            min=0,
            help="First tokens stored exactly; default: 4, or more if the gradients of the calibration set show more sinks.",
        ),
    ] = None,
    window: Annotated[
        int, typer.Option("--window", min=0, help="Most recent tokens that the stored codec keeps exactly.")
    ] = 0,
    kept_bits: Annotated[
        int, typer.Option("--kept-bits", help="Bits per value of the sinks and the window of the stored codec: 16 or 8.")
    ] = 16,
    block: Annotated[int, typer.Option("--block", min=1, max=65_535, help="Block size: tokens that decode together.")] = 128,
    live: Annotated[bool, typer.Option("--live", help="Fit the live codec of CompressedCache as well.")] = False,
    live_only: Annotated[bool, typer.Option("--live-only", help="Fit the live codec alone.")] = False,
    live_bits: Annotated[
        float | None,
        typer.Option("--live-bits", help="Bits per packed value of the live codec; default: the fewest within --max-nll."),
    ] = None,
    safe: Annotated[
        bool, typer.Option("--safe", help="Fit a live codec of 6.9 bits per packed value, whose loss is close to zero.")
    ] = False,
    device: Device = None,
    dtype: Dtype = None,
    batch_size: BatchSize = 8,
    seed: Seed = 0,
    memory: Memory = None,
) -> None:
    """Fit the codec `eigen` for a target size or a loss budget, and save it in a folder.

    Size and loss are measured on an eighth of the text that nothing is fitted on. An interrupted fit resumes when it is
    started again: metric and vectors lie in OUTPUT.partial until the codec is written.
    """
    check_folder(output.parent)
    from rich.console import Console

    from eigencache.api import fit
    from eigencache.calibration.kept_measurements import KeptMeasurements
    from eigencache.cli.progress import progress_bar
    from eigencache.codec.saved.folder import CARD, LIVE, check_replaceable
    from eigencache.corpora.resolve import read_text
    from eigencache.errors import BudgetError, EigencacheError
    from eigencache.fitting.eigen import EigenSettings
    from eigencache.fitting.fit import Goal, LiveGoal
    from eigencache.fitting.live import LiveSettings, check_bits
    from eigencache.fitting.summary import eigen_record, live_record
    from eigencache.report.codecs import codec_table, live_table

    check_replaceable(output)
    goal = Goal.of(bits, ratio, max_nll)
    live = live or live_only
    if (live_bits is not None or safe) and not live:
        raise BudgetError(f"{'--safe' if safe else '--live-bits'} is an option of the live codec: add --live")
    if live_only and (goals := given(command, ("bits", "ratio"))):
        raise BudgetError(f"{goals[0]} is a goal of the stored codec, which --live-only leaves out. Use --live-bits.")
    if live_only and (unread := given(command, _STORED)):
        raise BudgetError(f"{', '.join(unread)} cannot be combined with --live-only, which fits no stored codec.")
    if live_bits is not None:
        check_bits(live_bits, "live_bits")
    if live_bits is not None and safe:
        raise BudgetError("--live-bits and --safe both set the size of the live codec. Use one of them.")
    wanted = None
    if live:
        chosen = LiveSettings() if sinks is None else LiveSettings(sinks=sinks)
        wanted = LiveGoal(live_bits, None if safe or live_bits is not None else goal.max_nll, safe, chosen)
    settings = EigenSettings(
        scope=scope,  # type: ignore[arg-type] - checked by the settings
        metric=metric,
        alpha=alpha,
        text=text_prediction,
        sinks=sinks,
        window=window,
        kept_bits=kept_bits,
        block=block,
        group=group,
        amortize=amortize,
    )
    partial = partial_of(output)
    resumed = partial is not None and partial.exists()
    try:
        with keeping(partial), progress_bar(model) as on_progress:
            codec = fit(
                model,
                text=read_text(text),
                bits=bits,
                ratio=ratio,
                max_nll=max_nll,
                tokens=tokens,
                max_length=max_length,
                context=context,
                settings=None if live_only else settings,
                stored=not live_only,
                live=wanted or False,
                device=device,
                dtype=dtype,
                batch_size=batch_size,
                memory=in_bytes(memory),
                seed=seed,
                on_progress=on_progress,
                partial=partial,
            )
    except EigencacheError:  # a refusal leaves nothing behind, but what an interrupted fit kept stays
        if not resumed:
            KeptMeasurements(partial).clear()
        raise
    replaced, dropped = (output / CARD).is_file(), not codec.live and (output / LIVE).is_dir()
    codec.save(output)
    KeptMeasurements(partial).clear()
    fitted, loaded, console = codec.fitted, codec.loaded, Console()
    assert fitted is not None  # it was fitted here
    values = loaded.geometry.values_per_token
    if fitted.codec and fitted.expected:
        warnings = fitted.fitting.origin.calibration.warnings if fitted.fitting else []
        console.print(codec_table(eigen_record(loaded.name, fitted.codec, fitted.expected, values, amortize, warnings)))
    if fitted.live:
        console.print(live_table(live_record(loaded.name, *fitted.live, values)))
    if replaced:
        console.print(f"replaced: the codec that was in {output}.", markup=False, highlight=False)
    if dropped:
        said = f"dropped: the live codec that was in {output / LIVE}. Add --live to fit one."
        console.print(said, markup=False, highlight=False)
    print_written(output)
