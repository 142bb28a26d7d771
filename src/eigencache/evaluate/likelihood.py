"""Likelihood through the cache: text is scored while its past exists only in encoded form (THEORY 10).

A text is read in pieces. Nothing of the first piece is scored, because it reads no cache; before every later piece all
tokens older than the window are encoded, and attention sees what is decoded. `prefix` has two pieces, or many with a step:
before each the whole past is encoded anew as it was read uncompressed, so that sinks, windows and blocks are those of a
prefix of that length. `chunked` has many, and each codec goes on with what it has encoded. All codecs read the same pieces
beside the uncompressed cache. What makes caches of its own is given whole prefixes: it cannot go on chunk by chunk.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from eigencache.calibration.session import Session
from eigencache.codec.base import CacheMaker, Compressor
from eigencache.corpora.sequences import Sequences
from eigencache.errors import CodecError, CorpusError
from eigencache.evaluate.prefix import Window, check_positions, read, read_prefix
from eigencache.models.load import LoadedModel
from eigencache.records.quality import ReadingProtocol, SequenceLoss

UNCOMPRESSED = "uncompressed"
_POSITIONS = 256  # compared at a time: of a large vocabulary, logits are the largest tensors there are


@dataclass(frozen=True)
class Scored:
    """One batch: per codec the losses of its sequences, and what was held encoded at the end (tokens, bytes)."""

    losses: dict[str, list[SequenceLoss]]
    held: dict[str, tuple[int, int]]


@torch.no_grad()
def score_through_cache(
    session: Session, sequences: Sequences, codecs: Mapping[str, Compressor], protocol: ReadingProtocol, *, skip: int = 0
) -> Iterator[Scored]:
    """Score every sequence for every codec and for the uncompressed cache, batch by batch; `skip`: batches left out.

    Sequences that are not longer than the first piece by at least two tokens are left out. Raises `CorpusError` where
    none is longer, `ModelError` for more tokens than the model has positions, `NonFiniteError` naming the codec where
    logits are not finite, `CodecError` for what makes its own caches where there are more than two pieces, and what
    `read_prefix` raises.
    """
    if protocol.kind != "prefix" and (own := [n for n, codec in codecs.items() if isinstance(codec, CacheMaker)]):
        raise CodecError(f"{own[0]} is made of a whole prefix: it can be scored behind one, not chunk by chunk")
    check_positions(session.loaded, max(map(len, sequences.ids)))
    for batch in batches_of(sequences, protocol, session.batch_size)[skip:]:
        yield _score_batch(session.loaded, torch.from_numpy(np.stack(batch)).to(session.loaded.device), codecs, protocol)


def pieces(length: int, protocol: ReadingProtocol) -> list[tuple[int, int]]:
    """From and up to which token each piece goes; the last one reaches the end."""
    first, step = (protocol.length, protocol.step or length) if protocol.kind == "prefix" else (0, protocol.length)
    edges = [*range(first, length - 1, step), length]
    return list(pairwise([0, *edges] if first else edges))


def batches_of(sequences: Sequences, protocol: ReadingProtocol, batch_size: int) -> list[list[np.ndarray]]:
    """The batches that are scored, in order. Raises `CorpusError` where no sequence is long enough."""
    rows = [ids for ids in sequences.ids if len(ids) >= protocol.length + 2]
    if not rows:
        raise CorpusError(
            f"no sequence is longer than the first {protocol.length:,} tokens, of which none is scored: "
            "raise `max_length` or lower `prefix`"
        )
    return list(_of_equal_length(rows, batch_size))


def _of_equal_length(rows: list[np.ndarray], batch_size: int) -> Iterator[list[np.ndarray]]:
    """Consecutive sequences of one length, at most `batch_size` at a time: a cache knows nothing of padding."""
    batch: list[np.ndarray] = []
    for ids in rows:
        if batch and (len(batch) == batch_size or len(batch[0]) != len(ids)):
            yield batch
            batch = []
        batch.append(ids)
    if batch:
        yield batch


def _score_batch(loaded: LoadedModel, ids: Tensor, codecs: Mapping[str, Compressor], protocol: ReadingProtocol) -> Scored:
    (_, first), *later = pieces(ids.shape[1], protocol)
    goes_on, window = protocol.kind == "chunked", Window(protocol.window, protocol.block)
    prefix = whole = read_prefix(loaded, ids[:, : first if goes_on else later[-1][0]])
    plain, caches = prefix.cache(None), dict[str, Any]()
    sums = {name: torch.zeros(3, len(ids), dtype=torch.float64) for name in (UNCOMPRESSED, *codecs)}
    held: dict[str, tuple[int, int]] = {}
    for start, stop in later:
        piece, targets = ids[:, start:stop], ids[:, start + 1 : stop + 1]
        if not goes_on:
            prefix = whole.first(start)
            plain = prefix.cache(None)
        reference = read(loaded, piece, plain, UNCOMPRESSED)
        sums[UNCOMPRESSED] += compared(reference, reference, targets)
        for name, codec in codecs.items():
            cache = caches.pop(name, None) or prefix.cache(codec, window)
            if isinstance(codec, CacheMaker):
                held[name] = codec.held(cache)  # now: what is read later joins what it holds
            sums[name] += compared(reference, read(loaded, piece, cache, name), targets)
            if goes_on and stop < ids.shape[1]:  # the last piece's cache goes, so that one codec is held at a time
                caches[name] = cache
            elif not isinstance(codec, CacheMaker):
                held[name] = sum(b.tokens for b in cache.blocks) * len(ids), sum(b.nbytes for b in cache.blocks)
    scored = ids.shape[1] - 1 - first
    losses = {
        name: [SequenceLoss(tokens=scored, nll=nll, kl=kl, agree=round(agree)) for nll, kl, agree in total.T.tolist()]
        for name, total in sums.items()
    }
    return Scored(losses, held)


def compared(reference: Tensor, logits: Tensor, targets: Tensor) -> Tensor:
    """Sums of NLL, of KL(reference ‖ logits) and of equal first ranks, per row [3, batch], in float64.

    `targets` [batch, seq or seq − 1]: the last position has none where a text ends.
    """
    sums = torch.zeros(3, len(logits), dtype=torch.float64)
    for start in range(0, targets.shape[1], _POSITIONS):
        stop = min(start + _POSITIONS, targets.shape[1])
        p, q = (x[:, start:stop].float().log_softmax(-1) for x in (reference, logits))
        sums[0] -= q.gather(-1, targets[:, start:stop, None]).double().sum((1, 2)).cpu()
        sums[1] += F.kl_div(q, p, log_target=True, reduction="none").sum(-1).double().sum(1).cpu()
        sums[2] += (p.argmax(-1) == q.argmax(-1)).double().sum(1).cpu()
    return sums
