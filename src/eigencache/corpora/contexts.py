"""Distinct 8-token contexts of token sequences, their repetition, and warnings with figures.

A centered covariance has at most as many independent rows as the text has distinct contexts, however often the text repeats.
"""

from collections.abc import Iterable

import numpy as np
from numpy.typing import ArrayLike

CONTEXT = 8  # tokens; a power of two. Contexts that differ within 8 tokens give different vectors in every trained model
MAX_REPETITION = 0.5  # above it, most contexts repeat an earlier one, and the halves for held-out statistics are copies
MIN_CONTEXTS = 1_000  # about ten per dimension of a head of 96: fewer do not support a rank
MIN_SEQUENCES = 8  # a bootstrap over fewer gives intervals that are too narrow


def distinct_contexts(ids: Iterable[ArrayLike]) -> int:
    """Return the exact number of distinct 8-grams of token ids within sequences.

    Counted by prefix doubling: an 8-gram is a pair of 4-grams, and these are pairs of 2-grams. Grams are renumbered
    without gaps where a pair would exceed 63 bits. No hash is used, so there are no collisions. Cost: two to four sorts of
    the concatenated ids.

    Args:
        ids: Sequences, each a vector of integers of any length. A matrix is a list of its rows, a vector one sequence.
    """
    sequences = [ids] if isinstance(ids, np.ndarray) and ids.ndim == 1 else ids
    vectors = [np.asarray(sequence, dtype=np.int64) for sequence in sequences]
    if all(len(vector) < CONTEXT for vector in vectors):
        return 0
    lengths = np.array([len(vector) for vector in vectors])
    ends = np.repeat(np.cumsum(lengths), lengths)  # end of the sequence of every position
    grams, size = _numbered(np.concatenate(vectors))
    width = 1
    while width < CONTEXT:
        if size * size >= 2**63:
            grams, size = _numbered(grams)
        grams, size, width = grams[:-width] * size + grams[width:], size * size, 2 * width
    within = np.arange(len(grams)) + CONTEXT <= ends[: len(grams)]
    return len(np.unique(grams[within]))


def _numbered(values: np.ndarray) -> tuple[np.ndarray, int]:
    """Map values to consecutive numbers in [0, size), and return these and `size`."""
    distinct, numbers = np.unique(values, return_inverse=True)
    return numbers.astype(np.int64), len(distinct)


def total_contexts(ids: Iterable[np.ndarray]) -> int:
    """Return the number of 8-grams within sequences, counting repetitions.

    Args:
        ids: Sequences of token ids.
    """
    return sum(max(0, len(sequence) - CONTEXT + 1) for sequence in ids)


def context_warnings(tokens: int, distinct: int, repetition: float, sequences: int, copies: int) -> list[str]:
    """Return one sentence with figures for each way in which a text is too short or too repetitive.

    Args:
        tokens: Number of tokens.
        distinct: Number of distinct contexts.
        repetition: Share of contexts that repeat an earlier one, in [0, 1].
        sequences: Number of sequences.
        copies: Number of sequences that equal an earlier one.
    """
    warnings = []
    if repetition > MAX_REPETITION:
        warnings.append(
            f"REPETITIVE TEXT: {tokens:,} tokens hold only {distinct:,} distinct {CONTEXT}-token contexts "
            f"({100 * repetition:.0f} % repeats): ranks measured on it describe the text, not the model"
        )
    if distinct < MIN_CONTEXTS:
        warnings.append(
            f"TOO LITTLE TEXT: only {distinct:,} distinct {CONTEXT}-token contexts (minimum {MIN_CONTEXTS:,}): "
            "a spectrum needs ten for each of its dimensions"
        )
    if copies:
        warnings.append(
            f"COPIED SEQUENCES: {copies:,} of {sequences:,} equal an earlier one: "
            "held-out figures are not held out where the two halves share sequences"
        )
    if sequences < MIN_SEQUENCES:
        warnings.append(f"FEW SEQUENCES: {sequences:,} (minimum {MIN_SEQUENCES}): no intervals are given")
    return warnings
