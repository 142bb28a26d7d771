"""Evaluate codecs by likelihood in both protocols, generation, retrieval and bytes."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from eigencache.calibration.session import Session
from eigencache.codec.base import Codec
from eigencache.codec.byte_ledger import ledger
from eigencache.codec.saved.folder import AnyCodec, SavedCodec
from eigencache.corpora.overlap import check_overlap, check_sketched_overlap
from eigencache.corpora.sequences import Sequences
from eigencache.evaluate.codec_scoring import as_kept, scores_of
from eigencache.evaluate.divergence import checked_prompts, measure_divergence
from eigencache.evaluate.likelihood import score_through_cache, scored_batches
from eigencache.evaluate.prefix import WHOLE, Window
from eigencache.evaluate.resume import ResumableResults
from eigencache.evaluate.retrieval import checked_vocabulary, evaluate_retrieval
from eigencache.fitting.pca import PCACalibration
from eigencache.records.provenance import Stopwatch
from eigencache.records.quality import Divergence, EvaluationRecord, Likelihood, ReadingProtocol, Retrieval
from eigencache.records.run import Corpus

_PROMPT_TOKENS = 256  # or one sequence, if that is shorter


def check_evaluation(
    session: Session,
    sequences: Sequences,
    protocols: Sequence[ReadingProtocol],
    *,
    prompts: int = 8,
    tasks: Sequence[str] | None = None,
    lengths: Sequence[int] = (256,),
    examples: int = 32,
) -> None:
    """Check that every part of an evaluation can be measured, before a codec is fitted. Arguments: see `evaluate_codecs`.

    Raises:
        CorpusError: Sequences or contexts are too short, the text has too few prompts, or a task is unknown.
        ModelError: The model has too few positions.
        StatisticsError: Scoring needs more memory than the session allows.
        TokenizerMismatchError: The tokenizer has too few words for the tasks.
    """
    for protocol in protocols:
        scored_batches(session, sequences, protocol)
    if prompts:
        checked_prompts(session, sequences, prompts, _prompt_tokens(sequences))
    if tasks is None or tasks:
        checked_vocabulary(session, tasks=tasks, lengths=lengths, count=examples)


def evaluate_codecs(
    session: Session,
    sequences: Sequences,
    calibration: PCACalibration | SavedCodec,
    codecs: Mapping[str, AnyCodec],
    protocols: Sequence[ReadingProtocol],
    *,
    prompts: int = 8,
    tasks: Sequence[str] | None = None,
    lengths: Sequence[int] = (256,),
    examples: int = 32,
    window: Window = WHOLE,
    force: bool = False,
    partial: Path | None = None,
) -> EvaluationRecord:
    """Evaluate codecs on held-out text.

    Args:
        session: Model and settings to run it with.
        sequences: Held-out text.
        calibration: Calibration of the codecs, or the saved codec whose card describes it. `EigenCodec` needs the saved
            codec.
        codecs: Codecs by name.
        protocols: Reading protocols of the likelihood.
        prompts: Prompts for the divergence of generated text. 0 skips generation.
        tasks: Names of retrieval tasks. Default: all. `()` skips retrieval.
        lengths: Context lengths of the tasks, in tokens.
        examples: Examples per task, length and depth.
        window: Most recent tokens that stay uncompressed, and the encoding block size. Default: no window.
        force: Accept held-out text that overlaps the calibration text.
        partial: File that keeps finished results, to resume from. Default: none.

    Raises:
        CorpusError: The held-out text overlaps the calibration text and `force` is false.
        ModelError: The model has too few positions.
    """
    watch = Stopwatch()
    fitted_on, overlap = _calibration_text(calibration, sequences, force)
    saved = calibration.card.tensors_sha256 if isinstance(calibration, SavedCodec) else None
    values_per_token = session.loaded.geometry.values_per_token
    coded_bits = calibration.coded_bits if isinstance(calibration, SavedCodec) else None
    ledgers = {name: ledger(codec, values_per_token, coded_bits=coded_bits) for name, codec in codecs.items()}
    model = session.loaded.record("the cache itself")
    key = {
        "model": model.sha256,
        "texts": [text.model_dump() for text in (sequences.corpus, fitted_on)],
        "codecs": [*codecs, saved],
        "settings": [
            [p.model_dump() for p in protocols],
            prompts,
            tasks,
            lengths,
            examples,
            str(window),
            session.batch_size,
            session.seed,
        ],
    }
    kept = ResumableResults(partial, key)
    batches = [(p, index) for p in protocols for index in range(len(scored_batches(session, sequences, p)))]
    for protocol in protocols:
        before = [part for part in kept.done if part.get("protocol") == protocol.model_dump()]
        for scored in score_through_cache(session, sequences, codecs, protocol, skip=len(before)):
            kept.add({"protocol": protocol.model_dump()} | as_kept(scored))
            session.on_progress("likelihood", sum("losses" in part for part in kept.done), len(batches))
    if prompts and not any("divergence" in part for part in kept.done):
        divergences = measure_divergence(
            session,
            sequences,
            codecs,
            prompts=prompts,
            prompt_tokens=_prompt_tokens(sequences),
            window=Window(window.tokens, max(16, window.block)),
        )
        kept.add({"divergence": [divergence.model_dump() for divergence in divergences]})
    if (tasks is None or tasks) and not any("retrieval" in part for part in kept.done):
        cells = evaluate_retrieval(
            session,
            codecs,
            tasks=tasks,
            lengths=lengths,
            count=examples,
            window=window,
        )
        kept.add({"retrieval": [cell.model_dump() for cell in cells]})
    return EvaluationRecord(
        model=model,
        corpus=sequences.corpus,
        calibration=fitted_on,
        run=watch.run(session.seed, {"batch_size": session.batch_size, "forced": force, "codec_sha256": saved}),
        likelihood=[_likelihood(kept.done, protocol, codecs, values_per_token) for protocol in protocols],
        divergence=[Divergence(**d) for part in kept.done for d in part.get("divergence", ())],
        retrieval=[Retrieval(**r) for part in kept.done for r in part.get("retrieval", ())],
        ledgers=ledgers,
        warnings=[
            *sequences.corpus.warnings,
            *fitted_on.warnings,
            *([overlap] if overlap else []),
            *(calibration.notes if isinstance(calibration, PCACalibration) else ()),
        ],
    )


def _prompt_tokens(sequences: Sequences) -> int:
    return min(_PROMPT_TOKENS, sequences.corpus.max_length)


def _calibration_text(
    calibration: PCACalibration | SavedCodec, sequences: Sequences, force: bool
) -> tuple[Corpus, str | None]:
    """Return the record of the calibration text, and a warning if `sequences` overlap it."""
    if isinstance(calibration, SavedCodec):
        return calibration.card.origin.calibration, check_sketched_overlap(sequences.ids, calibration.windows, force=force)
    return calibration.sequences.corpus, check_overlap(sequences.ids, calibration.sequences.ids, force=force)


def _likelihood(
    done: list[dict], protocol: ReadingProtocol, codecs: Mapping[str, Codec], values_per_token: int
) -> Likelihood:
    batches = [part for part in done if part.get("protocol") == protocol.model_dump()]
    scores = scores_of(batches, codecs, values_per_token)
    return Likelihood(protocol=protocol, uncompressed_nll=scores.uncompressed_nll, results=list(scores.quality.values()))
