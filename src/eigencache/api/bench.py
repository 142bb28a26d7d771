"""`bench`: compression methods, compared by the bytes they hold at equal loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eigencache.api.opening import HELD_OUT_TEXT, TEXT, opened, packed
from eigencache.calibration.calibration_set import calibration_length
from eigencache.errors import CorpusError
from eigencache.evaluate.tasks import task_named
from eigencache.inputs import several, text_of
from eigencache.records.bench import BenchRecord
from eigencache.studies.bench.methods import chosen_methods
from eigencache.studies.bench.run import BenchSettings, bench_model

if TYPE_CHECKING:
    from eigencache.api.opening import Model, TextLike, Tokenizer

SEQUENCES = 64  # scored by a bench: fewer leave a loss of 0.01 nats to chance


def bench(
    model: Model,
    tokenizer: Tokenizer = None,
    text: TextLike = HELD_OUT_TEXT,
    calibration_text: TextLike = TEXT,
    *,
    settings: BenchSettings,
    lengths: Sequence[int] = (512, 2048),
    tokens: int | None = None,
    calibration_tokens: int = 65_536,
    force: bool = False,
    partial: str | Path | None = None,
    **options: Any,
) -> BenchRecord:
    """Compare compression methods by the bytes they hold at equal loss.

    Args:
        model: a name or folder, or a loaded model, which needs its `tokenizer`.
        tokenizer: a tokenizer, or the name of one.
        text: the held-out text that is scored.
        calibration_text: the text that methods are fitted on.
        settings: methods, rates, seeds and tasks.
        lengths: tokens per sequence; the last `settings.scored` of them are scored.
        tokens: tokens of `text`. Default: 64 sequences of every length.
        calibration_tokens: tokens that methods are fitted on for each seed. Every seed draws them anew from the first tokens
            of `calibration_text`, three times as many at most, so that the draws of two seeds overlap.
        force: score a text that overlaps the calibration text as well.
        partial: file that results are kept in while the bench runs, so that it can be resumed.
        **options: device, dtype, batch_size, memory and on_progress, as for `probe`.

    Returns:
        The record of the benchmark. Methods that do not support the model are listed with the reason.

    Raises:
        EigencacheError: one of `eigencache.errors`, such as `CodecError` for an unknown method.
    """
    settings = replace(settings, methods=tuple(chosen_methods(",".join(several(settings.methods)))))
    lengths, partial = several(lengths), None if partial is None else Path(partial)
    for task in settings.tasks:
        task_named(task)
    if short := [length for length in lengths if length < settings.scored + 8]:
        raise CorpusError(
            f"`lengths` {short[0]}: the last {settings.scored} tokens are scored, and at least 8 more have to be held. "
            f"Use {settings.scored + 8} or more."
        )
    source, calibration_source = text_of(text), text_of(calibration_text)
    with opened(model, tokenizer, **options) as session:
        wanted = calibration_tokens * min(len(settings.seeds), 3)
        calibration = packed(session, calibration_source, wanted, calibration_length(session.loaded))
        held_out = {
            length - settings.scored: packed(session, source, tokens or SEQUENCES * length, length) for length in lengths
        }
        return bench_model(session, calibration, calibration_tokens, held_out, settings, force=force, partial=partial)
