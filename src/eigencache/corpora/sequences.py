"""Packing of documents into token sequences of one length: every token once and in order, with counts for the record.

A sequence begins as prompts of its model do, because the first token is often the attention sink of all others: where the
tokenizer puts a BOS token before every text, each sequence has one.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from numbers import Integral
from typing import Any, NamedTuple

import numpy as np
import torch

from eigencache.corpora.contexts import CONTEXT, context_warnings, distinct_contexts, total_contexts
from eigencache.corpora.text import Document, Text
from eigencache.errors import CorpusError
from eigencache.records.run import Corpus

MIN_TAIL = 32  # tokens; a shorter last sequence is dropped, because its first tokens are attention sinks
BATCH_CHARS = 2**18  # characters tokenized at a time, about 65,000 tokens
BATCH_DOCUMENTS = 64  # limits the tokens that a short run tokenizes from small documents

OnProgress = Callable[[int, int | None], None]  # tokens so far, tokens requested (None: all of the text)


class Batch(NamedTuple):
    """Consecutive sequences, padded on the right."""

    input_ids: torch.Tensor  # Int64 [batch, longest]
    attention_mask: torch.Tensor  # Int64 [batch, longest]: 1 for a token, 0 for padding
    indices: list[int]  # of the sequences, ascending


@dataclass(frozen=True, eq=False)
class Sequences:
    """Token ids by sequence, and the record of their text; the last sequence may be shorter than the others."""

    ids: list[np.ndarray]  # Int64 [length] each
    corpus: Corpus

    def batches(self, batch_size: int, pad_id: int) -> Iterator[Batch]:
        """Return all sequences in order as batches, each padded to its longest sequence.

        Args:
            batch_size: Sequences per batch; the last batch may be smaller.
            pad_id: Token id of the padding.

        Raises:
            CorpusError: `batch_size` is below 1; raised at the call, not at the first batch.
        """
        if batch_size < 1:
            raise CorpusError(f"`batch_size` {batch_size} is too small: use 1 or more")
        starts = range(0, len(self.ids), batch_size)
        return (self._batch(range(start, min(start + batch_size, len(self.ids))), pad_id) for start in starts)

    def _batch(self, indices: range, pad_id: int) -> Batch:
        longest = max(len(self.ids[i]) for i in indices)
        input_ids = torch.full((len(indices), longest), pad_id, dtype=torch.int64)
        attention_mask = torch.zeros_like(input_ids)
        for row, i in enumerate(indices):
            input_ids[row, : len(self.ids[i])] = torch.from_numpy(self.ids[i])
            attention_mask[row, : len(self.ids[i])] = 1
        return Batch(input_ids, attention_mask, list(indices))


def pack(
    text: Text, tokenizer: Any, *, tokens: int | None, max_length: int, on_progress: OnProgress | None = None
) -> Sequences:
    """Cut the tokens of a text into sequences of `max_length`; concatenated, these are the tokens in order.

    Each document is preceded by the `bos_token_id` of the tokenizer (else its `eos_token_id`, else nothing), which counts as
    a token. Where the tokenizer puts BOS before every text, sequences that begin within a document have one as well. A
    shorter last sequence is kept if it has at least `MIN_TAIL` tokens. Documents are tokenized on demand, so memory grows
    with `tokens` and not with the text. A text with fewer than `tokens` tokens gives a warning in the record.

    Args:
        text: The text.
        tokenizer: A transformers tokenizer.
        tokens: Maximum number of tokens; None: the whole text.
        max_length: Tokens per sequence.
        on_progress: Called with the tokens so far and `tokens`.

    Raises:
        CorpusError: A number is not an integer, `max_length` is below 8, or text or `tokens` are shorter than one sequence.
    """
    for name, number in (("tokens", tokens), ("max_length", max_length)):
        if not isinstance(number, Integral | None):
            raise CorpusError(f"`{name}`={number!r} is not an integer")
    if max_length < CONTEXT:
        raise CorpusError(f"`max_length` {max_length} is too small: a sequence needs at least {CONTEXT} tokens")
    if tokens is not None and tokens < max_length:
        raise CorpusError(
            f"{text.name}: {tokens:,} tokens were requested, fewer than one sequence of {max_length:,}. "
            f"Request at least {max_length:,}, or use shorter sequences."
        )
    stream = _first(token_stream(text.documents, tokenizer), tokens, on_progress)
    if len(stream) < max_length:
        shorten = f" or `max_length` {len(stream)}" if len(stream) >= MIN_TAIL else ""
        raise CorpusError(
            f"{text.name}: text has {len(stream):,} tokens, fewer than one sequence of {max_length:,}: "
            f"give more text{shorten}"
        )
    ids = list(_cut(stream, max_length, tokens, _bos_of_every_text(tokenizer)))
    if len(ids[-1]) < min(MIN_TAIL, max_length):
        del ids[-1]
    return Sequences(ids, _record(text, ids, tokens, len(stream), max_length))


def token_stream(documents: Iterable[Document], tokenizer: Any) -> Iterator[np.ndarray]:
    """Yield the token ids of each document, Int64 [length].

    Each begins with the bos id (or the eos id) of the tokenizer, except for the continuation of a document.

    Args:
        documents: Documents in order.
        tokenizer: A transformers tokenizer.
    """
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    prefix = [] if start is None else [start]
    for batch in _batched(documents):
        encoded = tokenizer([document.text for document in batch], add_special_tokens=False, verbose=False)["input_ids"]
        for document, ids in zip(batch, encoded, strict=True):
            yield np.array([*([] if document.continued else prefix), *ids], dtype=np.int64)


def _batched(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch, chars = [], 0
    for document in documents:
        batch.append(document)
        chars += len(document.text)
        if chars >= BATCH_CHARS or len(batch) >= BATCH_DOCUMENTS:
            yield batch
            batch, chars = [], 0
    if batch:
        yield batch


def _first(stream: Iterable[np.ndarray], tokens: int | None, on_progress: OnProgress | None) -> np.ndarray:
    """Return the first `tokens` of a stream, without reading more of it than necessary."""
    pieces, total = [np.empty(0, dtype=np.int64)], 0
    for ids in stream:
        pieces.append(ids if tokens is None else ids[: tokens - total])
        total += len(pieces[-1])
        if on_progress is not None:
            on_progress(total, tokens)
        if total == tokens:
            break
    return np.concatenate(pieces)


def _bos_of_every_text(tokenizer: Any) -> int | None:
    bos = tokenizer.bos_token_id
    return bos if bos is not None and tokenizer("a")["input_ids"][:1] == [bos] else None


def _cut(stream: np.ndarray, max_length: int, tokens: int | None, bos: int | None) -> Iterator[np.ndarray]:
    """Yield sequences of at most `tokens` tokens in all, each with `bos` before it unless that is None or already there."""
    left = 2 * len(stream) if tokens is None else tokens
    while len(stream) and left:
        start = np.array([] if bos is None or stream[0] == bos else [bos], dtype=np.int64)
        end = min(max_length, left) - len(start)
        yield np.concatenate((start, stream[:end]))
        left -= len(start) + len(stream[:end])
        stream = stream[end:]


def _record(text: Text, ids: list[np.ndarray], requested: int | None, available: int, max_length: int) -> Corpus:
    used = sum(map(len, ids))
    distinct = distinct_contexts(ids)
    repetition = 1 - distinct / total_contexts(ids)
    copies = len(ids) - len({sequence.tobytes() for sequence in ids})
    warnings = context_warnings(used, distinct, repetition, len(ids), copies)
    if requested is not None and available < requested:
        warnings.insert(0, f"asked for {requested:,} tokens, the text has {available:,}")
    return Corpus(
        name=text.name,
        sha256=text.sha256,
        tokens=used,
        sequences=len(ids),
        max_length=max_length,
        distinct_token_ids=len(np.unique(np.concatenate(ids))),
        distinct_8grams=distinct,
        repetition=repetition,
        warnings=warnings,
    )
