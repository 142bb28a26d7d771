"""Summarize losses per sequence as ΔNLL and KL with paired bootstrap intervals over sequences (THEORY 10)."""

from collections.abc import Sequence

import numpy as np

from eigencache.corpora.contexts import MIN_SEQUENCES
from eigencache.records.base import Interval
from eigencache.records.quality import Quality, SequenceLoss

REPLICATES = 2000


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
    """Summarize the losses of one codec.

    Args:
        codec: Name of the codec.
        losses: Losses of the codec per sequence.
        uncompressed: Losses of the uncompressed cache on the same sequences, in the same order.
        encoded_tokens: Tokens that were encoded.
        encoded_nbytes: Their bytes.
        values_per_token: Cached values per token, over all layers.
        basis_nbytes: Bytes of the codec's side information, which is stored once.
        seed: Seed of the bootstrap.
    """
    tokens = sum(loss.tokens for loss in losses)
    scored = np.array([loss.tokens for loss in losses])
    differences = np.array([a.nll - b.nll for a, b in zip(losses, uncompressed, strict=True)])
    return Quality(
        codec=codec,
        tokens=tokens,
        sequences=len(losses),
        nll=sum(loss.nll for loss in losses) / tokens,
        delta_nll=float(differences.sum() / tokens),
        delta_nll_interval=paired_interval(differences, scored, seed),
        kl=sum(loss.kl for loss in losses) / tokens,
        kl_interval=paired_interval(np.array([loss.kl for loss in losses]), scored, seed),
        top1_agreement=sum(loss.agree for loss in losses) / tokens,
        encoded_tokens=encoded_tokens,
        encoded_nbytes=encoded_nbytes,
        sixteen_bit_nbytes=2 * values_per_token * encoded_tokens,
        basis_nbytes=basis_nbytes,
    )


def paired_interval(differences: np.ndarray, tokens: np.ndarray, seed: int = 0) -> Interval | None:
    """Return the 95 % bootstrap percentile interval of Σ differences / Σ tokens over sequences.

    Args:
        differences: Loss differences, or KL divergences, per sequence in nats [sequences].
        tokens: Scored tokens per sequence [sequences].
        seed: Seed of the bootstrap.

    Returns:
        Lower and upper end in nats per token, or None with fewer than 8 sequences.
    """
    if len(differences) < MIN_SEQUENCES:
        return None
    draws = np.random.default_rng(seed).integers(0, len(differences), (REPLICATES, len(differences)))
    means = differences[draws].sum(1) / tokens[draws].sum(1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)
