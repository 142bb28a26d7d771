"""Split a text into two halves without common sequences: a validation half to choose on, a test half to report on."""

from dataclasses import replace

import numpy as np

from eigencache.corpora.contexts import MIN_SEQUENCES, distinct_contexts, total_contexts
from eigencache.corpora.overlap import MAX_SHARE, overlap_share
from eigencache.corpora.sequences import Sequences
from eigencache.errors import CorpusError
from eigencache.records.quality import ReadingProtocol


def halves_of(sequences: Sequences, protocol: ReadingProtocol) -> tuple[Sequences, Sequences]:
    """Return the first and the second half of the sequences that are long enough to be scored.

    Neighboring sequences stay in the same half, because they often come from one document.

    Args:
        sequences: Held-out text.
        protocol: Reading protocol; its `length` gives the tokens of the prefix.

    Raises:
        CorpusError: A half has too few sequences for a confidence interval.
    """
    usable = [index for index, ids in enumerate(sequences.ids) if len(ids) >= protocol.length + 2]
    if len(usable) < 2 * MIN_SEQUENCES:
        remedy = "Raise `tokens` or lower `max_length`." if usable else "Raise `max_length` or lower `prefix`."
        raise CorpusError(
            f"{len(usable)} sequences have at least {protocol.length + 2:,} tokens, but "
            f"{2 * MIN_SEQUENCES} are needed: {MIN_SEQUENCES} to choose on and {MIN_SEQUENCES} to report the loss on. "
            f"{remedy}"
        )
    middle = len(usable) // 2
    return _half(sequences, usable[:middle]), _half(sequences, usable[middle:])


def some_of(sequences: Sequences, count: int) -> Sequences:
    """Return at most `count` of the sequences, evenly spaced."""
    step = max(1, len(sequences.ids) // count)
    indices = list(range(0, len(sequences.ids), step))[:count]
    return _part(sequences, indices, f"{sequences.corpus.name}, {len(indices)} of them")


def _half(sequences: Sequences, indices: list[int]) -> Sequences:
    span = f"sequences {indices[0] + 1}–{indices[-1] + 1} of {len(sequences.ids)}"
    return _part(sequences, indices, f"{sequences.corpus.name}, {span}")


def _part(sequences: Sequences, indices: list[int], name: str) -> Sequences:
    """Return the sequences of `indices` with a corpus record that describes them alone."""
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
    """Return a warning if the text of one half also occurs in the other, which biases the reported loss downwards."""
    share = overlap_share(stating.ids, choosing.ids)
    if share <= MAX_SHARE:
        return None
    return f"{100 * share:.0f} % of the test half repeats text of the validation half: the reported loss is biased downwards"
