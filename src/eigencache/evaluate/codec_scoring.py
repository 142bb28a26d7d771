"""Score codecs by the likelihood of text with a compressed cache, batch by batch, with resumable results."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eigencache.calibration.session import Session
from eigencache.codec.base import Compressor
from eigencache.corpora.sequences import Sequences
from eigencache.evaluate.likelihood import UNCOMPRESSED, ReadPrefix, Scored, score_through_cache, scored_batches
from eigencache.evaluate.prefix import read_prefix
from eigencache.evaluate.resume import ResumableResults
from eigencache.evaluate.summary import summarize
from eigencache.records.quality import Quality, ReadingProtocol, SequenceLoss
from eigencache.records.run import Corpus


@dataclass(frozen=True)
class CodecScores:
    """Losses of codecs and of the uncompressed cache.

    Args:
        uncompressed_nll: Loss of the uncompressed cache, in nats per token.
        quality: Loss and size of every codec, by name.
        excess: Loss above the uncompressed cache in nats, per codec and sequence.
    """

    uncompressed_nll: float
    quality: dict[str, Quality]
    excess: dict[str, list[float]]


def score_codecs(
    session: Session,
    sequences: Sequences,
    codecs: Mapping[str, Compressor],
    protocol: ReadingProtocol,
    *,
    calibration: Corpus,
    partial: Path | None = None,
    read_first: ReadPrefix = read_prefix,
) -> CodecScores:
    """Score all codecs and the uncompressed cache on the same sequences.

    Args:
        session: Model and settings to run it with.
        sequences: Held-out text.
        codecs: Codecs by name.
        protocol: Reading protocol.
        calibration: Record of the text on which the codecs were fitted.
        partial: File that keeps finished batches. Results of an identical earlier run are resumed. Default: none.
        read_first: As in `score_through_cache`.

    Raises:
        ModelError: The model has fewer positions than a sequence has tokens.
        CorpusError: No sequence is long enough to be scored, or another error of `score_through_cache`.
    """
    key = {
        "model": session.loaded.sha256,
        "text": sequences.corpus.model_dump(),
        "calibration": calibration.model_dump(),
        "protocol": protocol.model_dump(),
        "codecs": {name: codec.nbytes for name, codec in codecs.items()},
        "batch": session.batch_size,
    }
    kept = ResumableResults(partial, key)
    total = len(scored_batches(session, sequences, protocol))
    session.on_progress("scoring", len(kept.done), total)
    for scored in score_through_cache(session, sequences, codecs, protocol, skip=len(kept.done), read_first=read_first):
        kept.add(as_kept(scored))
        session.on_progress("scoring", len(kept.done), total)
    return scores_of(kept.done, codecs, session.loaded.geometry.values_per_token)


def as_kept(scored: Scored) -> dict[str, Any]:
    """Return a scored batch as a JSON object for the partial file."""
    losses = {name: [loss.model_dump() for loss in rows] for name, rows in scored.losses.items()}
    return {"losses": losses, "held": scored.held}


def scores_of(batches: Sequence[dict[str, Any]], codecs: Mapping[str, Compressor], values_per_token: int) -> CodecScores:
    """Summarize the batches of a partial file.

    Args:
        batches: Objects of `as_kept`.
        codecs: Codecs by name.
        values_per_token: Cached values per token, over all layers.
    """

    def losses_of(name: str) -> list[SequenceLoss]:
        return [SequenceLoss(**loss) for batch in batches for loss in batch["losses"][name]]

    plain = losses_of(UNCOMPRESSED)
    quality = {
        name: summarize(
            name,
            losses_of(name),
            plain,
            encoded_tokens=sum(batch["held"][name][0] for batch in batches),
            encoded_nbytes=sum(batch["held"][name][1] for batch in batches),
            values_per_token=values_per_token,
            basis_nbytes=codec.nbytes,
        )
        for name, codec in codecs.items()
    }
    excess = {name: [a.nll - b.nll for a, b in zip(losses_of(name), plain, strict=True)] for name in codecs}
    return CodecScores(sum(loss.nll for loss in plain) / sum(loss.tokens for loss in plain), quality, excess)
