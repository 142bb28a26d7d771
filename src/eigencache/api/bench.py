"""`bench`: compression methods, compared by the bytes they hold at equal loss."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eigencache.api.opening import HELD_OUT_TEXT, TEXT, opened, packed
from eigencache.calibration.calibration_set import calibration_length
from eigencache.errors import CorpusError
from eigencache.evaluate.tasks import task_named
from eigencache.inputs import text_of
from eigencache.records.bench import BenchRecord
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
    partial: Path | None = None,
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
        calibration_tokens: tokens of `calibration_text` for each seed.
        force: score a text that overlaps the calibration text as well.
        partial: file that results are kept in while the bench runs, so that it can be resumed.
        **options: device, dtype, batch_size, memory and on_progress, as for `probe`.

    Raises:
        EigencacheError: one of `eigencache.errors`.
    """
    for task in settings.tasks:
        task_named(task)
    if short := [length for length in lengths if length < settings.scored + 8]:
        raise CorpusError(
            f"`lengths` {short[0]}: the last {settings.scored} tokens are scored, at least 8 more have to be held"
        )
    source, calibration_source = text_of(text), text_of(calibration_text)
    with opened(model, tokenizer, **options) as session:
        wanted = calibration_tokens * min(len(settings.seeds), 3)
        calibration = packed(session, calibration_source, wanted, calibration_length(session.loaded))
        held_out = {
            length - settings.scored: packed(session, source, tokens or SEQUENCES * length, length) for length in lengths
        }
        return bench_model(session, calibration, calibration_tokens, held_out, settings, force=force, partial=partial)
