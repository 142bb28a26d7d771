"""A text in two parts that share no sequence: one to choose on, one to state the loss of what was chosen on."""

from dataclasses import replace

import numpy as np

from eigencache.corpora.contexts import distinct_contexts, total_contexts
from eigencache.corpora.overlap import MAX_SHARE, overlap_share
from eigencache.corpora.sequences import Sequences
from eigencache.errors import CorpusError
from eigencache.evaluate.summary import MIN_SEQUENCES
from eigencache.records.quality import ReadingProtocol


def halves_of(sequences: Sequences, protocol: ReadingProtocol) -> tuple[Sequences, Sequences]:
    """The first half of the sequences that can be scored, and the rest: neighbors, which share documents, stay together.

    Raises `CorpusError` where a half would have too few sequences for an interval.
    """
    usable = [index for index, ids in enumerate(sequences.ids) if len(ids) >= protocol.length + 2]
    if len(usable) < 2 * MIN_SEQUENCES:
        raise CorpusError(
            f"{len(usable)} sequences are longer than the first {protocol.length:,} tokens: {2 * MIN_SEQUENCES} are needed, "
            f"{MIN_SEQUENCES} to choose on and as many to state the loss on: raise `tokens` or shorten `max_length`"
        )
    middle = len(usable) // 2
    return _half(sequences, usable[:middle]), _half(sequences, usable[middle:])


def some_of(sequences: Sequences, count: int) -> Sequences:
    """At most `count` of the sequences, from all over them."""
    step = max(1, len(sequences.ids) // count)
    indices = list(range(0, len(sequences.ids), step))[:count]
    return _part(sequences, indices, f"{sequences.corpus.name}, {len(indices)} of them")


def _half(sequences: Sequences, indices: list[int]) -> Sequences:
    of = f"sequences {indices[0] + 1}–{indices[-1] + 1} of {len(sequences.ids)}"
    return _part(sequences, indices, f"{sequences.corpus.name}, {of}")


def _part(sequences: Sequences, indices: list[int], name: str) -> Sequences:
    """Some of the sequences, with a record of their own."""
    ids = [sequences.ids[index] for index in indices]
    distinct = distinct_contexts(ids)
    corpus = sequences.corpus.model_copy(
        update={
            "name": name,
            "tokens": sum(map(len, ids)),
            "sequences": len(ids),
            "distinct_token_ids": len(np.unique(np.concatenate(ids))),
            "distinct_8grams": distinct,
            "repetition": 1 - distinct / total_contexts(ids),
        }
    )
    return replace(sequences, ids=ids, corpus=corpus)


def repeats(choosing: Sequences, stating: Sequences) -> str | None:
    """A warning where the text of one part is also in the other: the stated loss is then of what was chosen on."""
    share = overlap_share(stating.ids, choosing.ids)
    if share <= MAX_SHARE:
        return None
    return f"{100 * share:.0f} % of the part that the loss is stated on repeats the part that was chosen on: it flatters"
