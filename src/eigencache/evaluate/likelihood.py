"""Measure the likelihood of text whose past is available only in compressed form (THEORY 10).

A text is read in pieces. The first piece is not scored, because it does not read the cache. Before every later piece, all
tokens older than the window are encoded, and attention uses the decoded tokens. There are two protocols:

* `prefix` has two pieces, or more if it has a step. Before each piece, the whole past is read uncompressed and encoded
  again, so that sinks, windows and blocks are those of a prefix of that length.
* `chunked` has many pieces. Each codec keeps its encoded tokens and adds to them.

All codecs and the uncompressed cache read the same pieces. A `CacheMaker` needs whole prefixes and does not support
`chunked`.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from eigencache.calibration.pass_memory import affordable_rows, check_scoring
from eigencache.calibration.session import Session
from eigencache.codec.base import CacheMaker, Compressor
from eigencache.corpora.sequences import Sequences
from eigencache.errors import CodecError, CorpusError
from eigencache.evaluate.prefix import Prefix, Window, check_positions, read, read_prefix
from eigencache.memory import release
from eigencache.models.load import LoadedModel
from eigencache.records.quality import ReadingProtocol, SequenceLoss

UNCOMPRESSED = "uncompressed"
ReadPrefix = Callable[[LoadedModel, Tensor], Prefix]
_POSITIONS = 256  # positions compared at a time, to limit memory: logits of large vocabularies are the largest tensors


@dataclass(frozen=True)
class Scored:
    """Scores of one batch.

    Args:
        losses: Losses of its sequences, by codec.
        held: Tokens that were encoded at the end and their bytes, by codec.
    """

    losses: dict[str, list[SequenceLoss]]
    held: dict[str, tuple[int, int]]


@torch.no_grad()
def score_through_cache(
    session: Session,
    sequences: Sequences,
    codecs: Mapping[str, Compressor],
    protocol: ReadingProtocol,
    *,
    skip: int = 0,
    read_first: ReadPrefix = read_prefix,
) -> Iterator[Scored]:
    """Score every sequence with every codec and with the uncompressed cache, batch by batch.

    Sequences with fewer than two tokens after the first piece are skipped.

    Args:
        session: Model and settings to run it with.
        sequences: Held-out text.
        codecs: Codecs by name.
        protocol: Reading protocol.
        skip: Number of batches to skip at the start.
        read_first: Reads a prefix without compression; `KeptPrefixes` reads it once for several calls.

    Yields:
        The scores of each batch.

    Raises:
        CorpusError: No sequence is long enough.
        ModelError: A sequence has more tokens than the model has positions.
        NonFiniteError: Logits are not finite; the error names the codec.
        CodecError: A `CacheMaker` is scored with the `chunked` protocol.
        UnsupportedArchitectureError: Layers cache something other than keys and values (`read_prefix`).
    """
    if protocol.kind != "prefix" and (makers := [n for n, codec in codecs.items() if isinstance(codec, CacheMaker)]):
        raise CodecError(f"{makers[0]} needs a whole prefix and cannot be scored chunk by chunk. Use the prefix protocol.")
    for batch in scored_batches(session, sequences, protocol)[skip:]:
        ids = torch.from_numpy(np.stack(batch)).to(session.loaded.device)
        yield _score_batch(session.loaded, ids, codecs, protocol, read_first)
        release()


def pieces(length: int, protocol: ReadingProtocol) -> list[tuple[int, int]]:
    """Return the first token and the end (exclusive) of each piece of a sequence; the last one ends at `length`.

    Args:
        length: Tokens of the sequence.
        protocol: Reading protocol.
    """
    first, step = (protocol.length, protocol.step or length) if protocol.kind == "prefix" else (0, protocol.length)
    edges = [*range(first, length - 1, step), length]
    return list(pairwise([0, *edges] if first else edges))


def scored_batches(session: Session, sequences: Sequences, protocol: ReadingProtocol) -> list[list[np.ndarray]]:
    """Return the batches of `batches_of`, of as many sequences as the session allows and as memory for logits permits.

    No text is read, so a study calls this before it fits anything, to learn whether the text can be scored.

    Args:
        session: Model, and most sequences per batch.
        sequences: Held-out text.
        protocol: Reading protocol.

    Raises:
        CorpusError: No sequence is long enough.
        ModelError: A sequence has more tokens than the model has positions.
        StatisticsError: Scoring needs more memory than the session allows.
    """
    length = max(map(len, sequences.ids))
    check_positions(session.loaded, length)
    longest = max(stop - start for start, stop in pieces(length, protocol)[1:] or [(0, 1)])
    batches = batches_of(sequences, protocol, affordable_rows(session.loaded, session.batch_size, longest))
    check_scoring(session, length, longest)
    return batches


def batches_of(sequences: Sequences, protocol: ReadingProtocol, batch_size: int) -> list[list[np.ndarray]]:
    """Return the batches that are scored, in order.

    Args:
        sequences: Held-out text.
        protocol: Reading protocol.
        batch_size: Most sequences per batch.

    Raises:
        CorpusError: No sequence is long enough.
    """
    rows = [ids for ids in sequences.ids if len(ids) >= protocol.length + 2]
    if not rows:
        raise CorpusError(
            f"every sequence has fewer than {protocol.length + 2:,} tokens: the first {protocol.length:,} are not scored, "
            "and 2 more are needed. Raise `max_length`."
        )
    return list(_of_equal_length(rows, batch_size))


def _of_equal_length(rows: list[np.ndarray], batch_size: int) -> Iterator[list[np.ndarray]]:
    """Batch consecutive sequences of equal length, because compressed caches do not support padding."""
    batch: list[np.ndarray] = []
    for ids in rows:
        if batch and (len(batch) == batch_size or len(batch[0]) != len(ids)):
            yield batch
            batch = []
        batch.append(ids)
    if batch:
        yield batch


def _score_batch(
    loaded: LoadedModel, ids: Tensor, codecs: Mapping[str, Compressor], protocol: ReadingProtocol, read_first: ReadPrefix
) -> Scored:
    (_, first), *later = pieces(ids.shape[1], protocol)
    chunked, window = protocol.kind == "chunked", Window(protocol.window, protocol.block)
    prefix = whole = read_first(loaded, ids[:, : first if chunked else later[-1][0]])
    plain, caches = prefix.cache(None), dict[str, Any]()
    sums = {name: torch.zeros(3, len(ids), dtype=torch.float64) for name in (UNCOMPRESSED, *codecs)}
    held: dict[str, tuple[int, int]] = {}
    for start, stop in later:
        piece, targets = ids[:, start:stop], ids[:, start + 1 : stop + 1]
        if not chunked:
            prefix = whole.first(start)
            plain = prefix.cache(None)
        reference = read(loaded, piece, plain, UNCOMPRESSED)
        sums[UNCOMPRESSED] += compared(reference, reference, targets)
        for name, codec in codecs.items():
            cache = caches.pop(name, None) or prefix.cache(codec, window)
            if isinstance(codec, CacheMaker):
                held[name] = codec.held(cache)  # before the piece below is added to the cache
            sums[name] += compared(reference, read(loaded, piece, cache, name), targets)
            if chunked and stop < ids.shape[1]:  # caches of the last piece are freed at once, to save memory
                caches[name] = cache
            elif not isinstance(codec, CacheMaker):
                held[name] = sum(b.tokens for b in cache.blocks) * len(ids), sum(b.nbytes for b in cache.blocks)
    scored = ids.shape[1] - 1 - first
    losses = {
        name: [
            SequenceLoss(tokens=scored, nll=nll, kl=max(0.0, kl), agree=round(agree))  # rounding can make KL negative
            for nll, kl, agree in total.T.tolist()
        ]
        for name, total in sums.items()
    }
    return Scored(losses, held)


def compared(reference: Tensor, logits: Tensor, targets: Tensor) -> Tensor:
    """Return sums over positions of NLL, KL(reference ‖ logits) and top-1 agreement.

    Args:
        reference: Logits of the uncompressed cache [batch, seq, vocabulary].
        logits: Logits of a codec [batch, seq, vocabulary].
        targets: Next tokens [batch, seq], or [batch, seq − 1] if the text ends at the last position.

    Returns:
        Sums in nats and in counts, [3, batch], float64.
    """
    sums = torch.zeros(3, len(logits), dtype=torch.float64)
    for start in range(0, targets.shape[1], _POSITIONS):
        stop = min(start + _POSITIONS, targets.shape[1])
        p, q = (x[:, start:stop].float().log_softmax(-1) for x in (reference, logits))
        sums[0] -= q.gather(-1, targets[:, start:stop, None]).double().sum((1, 2)).cpu()
        sums[1] += F.kl_div(q, p, log_target=True, reduction="none").sum(-1).double().sum(1).cpu()
        sums[2] += (p.argmax(-1) == q.argmax(-1)).double().sum(1).cpu()
    return sums
