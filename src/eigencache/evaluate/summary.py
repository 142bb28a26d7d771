"""From losses per sequence to what a codec costs: ΔNLL with a paired bootstrap interval over sequences (THEORY 10)."""

from collections.abc import Sequence

import numpy as np

from eigencache.records.base import Interval
from eigencache.records.quality import Quality, SequenceLoss

REPLICATES = 2000
MIN_SEQUENCES = 8  # a bootstrap over fewer units gives intervals that are too narrow to be believed


def summarize(
    codec: str,
    losses: Sequence[SequenceLoss],
    uncompressed: Sequence[SequenceLoss],
    *,
    encoded_tokens: int,
    encoded_nbytes: int,
    values_per_token: int,
    basis_nbytes: int,
    seed: int = 0,
) -> Quality:
    """Quality of one codec from its losses and those of the uncompressed cache on the same sequences, in order."""
    tokens = sum(loss.tokens for loss in losses)
    differences = np.array([a.nll - b.nll for a, b in zip(losses, uncompressed, strict=True)])
    return Quality(
        codec=codec,
        tokens=tokens,
        sequences=len(losses),
        nll=sum(loss.nll for loss in losses) / tokens,
        delta_nll=float(differences.sum() / tokens),
        delta_nll_interval=paired_interval(differences, np.array([loss.tokens for loss in losses]), seed),
        kl=sum(loss.kl for loss in losses) / tokens,
        top1_agreement=sum(loss.agree for loss in losses) / tokens,
        encoded_tokens=encoded_tokens,
        encoded_nbytes=encoded_nbytes,
        sixteen_bit_nbytes=2 * values_per_token * encoded_tokens,
        basis_nbytes=basis_nbytes,
    )


def paired_interval(differences: np.ndarray, tokens: np.ndarray, seed: int = 0) -> Interval | None:
    """95 % percentile interval of Σ differences / Σ tokens when sequences are drawn anew; None with fewer than 8."""
    if len(differences) < MIN_SEQUENCES:
        return None
    draws = np.random.default_rng(seed).integers(0, len(differences), (REPLICATES, len(differences)))
    means = differences[draws].sum(1) / tokens[draws].sum(1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)
