"""How much of a token stream is new: distinct 8-token contexts, repetition, and warnings with figures.

A centered covariance has no more independent rows than the text has distinct contexts, however often it is repeated.
"""

from collections.abc import Iterable

import numpy as np
from numpy.typing import ArrayLike

CONTEXT = 8  # tokens; a power of two. What differs within 8 tokens gives different vectors in every trained model
MAX_REPETITION = 0.5  # above it, at least every second vector repeats another, and held-out halves are copies
MIN_CONTEXTS = 1_000  # about ten for each dimension of a head of 96: fewer cannot carry a rank
MIN_SEQUENCES = 16  # a bootstrap over fewer gives intervals that are too narrow to be believed


def distinct_contexts(ids: Iterable[ArrayLike]) -> int:
    """The exact number of distinct 8-grams of token ids that lie within one sequence.

    `ids` holds the sequences, each a vector of integers of any length (a matrix is a list of its rows; a single
    vector is one sequence). By prefix doubling: an 8-gram is a pair of 4-grams, these are pairs of 2-grams, each
    numbered without gaps where a pair would not fit into 63 bits. No hash is involved, so nothing can collide.
    Cost: two to four sorts of the concatenation.
    """
    sequences = [ids] if isinstance(ids, np.ndarray) and ids.ndim == 1 else ids
    vectors = [np.asarray(sequence, dtype=np.int64) for sequence in sequences]
    if all(len(vector) < CONTEXT for vector in vectors):
        return 0
    lengths = np.array([len(vector) for vector in vectors])
    ends = np.repeat(np.cumsum(lengths), lengths)  # of the sequence that a position belongs to
    grams, size = _numbered(np.concatenate(vectors))
    width = 1
    while width < CONTEXT:
        if size * size >= 2**63:
            grams, size = _numbered(grams)
        grams, size, width = grams[:-width] * size + grams[width:], size * size, 2 * width
    within = np.arange(len(grams)) + CONTEXT <= ends[: len(grams)]
    return len(np.unique(grams[within]))


def _numbered(values: np.ndarray) -> tuple[np.ndarray, int]:
    """Equal values become equal numbers in [0, size), different values different ones."""
    distinct, numbers = np.unique(values, return_inverse=True)
    return numbers.astype(np.int64), len(distinct)


def total_contexts(ids: Iterable[np.ndarray]) -> int:
    """The number of 8-grams that lie within one sequence, repeated ones counted each time."""
    return sum(max(0, len(sequence) - CONTEXT + 1) for sequence in ids)


def context_warnings(tokens: int, distinct: int, repetition: float, sequences: int, copies: int) -> list[str]:
    """One loud sentence with its figures for each way in which a text is too little or too repetitive.

    `copies` is the number of sequences that equal an earlier one, `repetition` a fraction in [0, 1].
    """
    warnings = []
    if repetition > MAX_REPETITION:
        warnings.append(
            f"REPETITIVE TEXT: {tokens:,} tokens hold only {distinct:,} distinct {CONTEXT}-token contexts "
            f"({100 * repetition:.0f} % repeats): ranks measured on it describe the text, not the model"
        )
    if distinct < MIN_CONTEXTS:
        warnings.append(
            f"TOO LITTLE TEXT: only {distinct:,} distinct {CONTEXT}-token contexts ({MIN_CONTEXTS:,} are the least): "
            "a spectrum needs ten for each of its dimensions"
        )
    if copies:
        warnings.append(
            f"COPIED SEQUENCES: {copies:,} of {sequences:,} equal an earlier one: "
            "held-out figures are not held out where a half contains the other's copies"
        )
    if sequences < MIN_SEQUENCES:
        warnings.append(f"FEW SEQUENCES: {sequences:,} ({MIN_SEQUENCES} are the least): intervals cannot be given")
    return warnings
