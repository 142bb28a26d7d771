"""Data whose truth is known, and moments of them: what the tests of `eigencache.spectral` measure."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import settings

from eigencache.records.probe import Spectrum
from eigencache.spectral.measure import Place, measure
from eigencache.spectral.moments import Moments

PLACE = Place(layer_idx=0, head=0, kind="keys", frame="pre_rope", scope="head")
MANY = 10**9  # distinct contexts, where a test is not about them
repeatable = settings(derandomize=True, deadline=None)


def white(seed: int, sequences: int, length: int, width: int) -> np.ndarray:
    """Independent standard normal vectors [sequences, length, width]."""
    return np.random.default_rng(seed).standard_normal((sequences, length, width))


def autoregressive(seed: int, sequences: int, length: int, width: int, rho: float) -> np.ndarray:
    """Vectors of variance 1 whose every number is an AR(1) process along the sequence, ρ_k = ρ^k."""
    x = white(seed, sequences, length, width)
    for t in range(1, length):
        x[:, t] = rho * x[:, t - 1] + np.sqrt(1 - rho**2) * x[:, t]
    return x


def rotation(seed: int, width: int) -> np.ndarray:
    """A random orthogonal matrix."""
    return np.linalg.qr(np.random.default_rng(seed).standard_normal((width, width)))[0]


def planted(seed: int, sequences: int, length: int, width: int, eigenvalues: list[float]) -> np.ndarray:
    """Vectors in a random subspace with the given population eigenvalues; there is nothing outside of it."""
    coefficients = white(seed, sequences, length, len(eigenvalues)) * np.sqrt(eigenvalues)
    return coefficients @ rotation(seed + 1, width)[: len(eigenvalues)]


def moments_of(data: np.ndarray, folds: int = 8) -> Moments:
    """Moments of [sequences, length, width], neighboring sequences in one fold."""
    moments = Moments(data.shape[-1], folds=folds)
    for fold, part in enumerate(np.array_split(data, folds)):
        if len(part):
            moments.update(torch.from_numpy(part).flatten(0, 1).unsqueeze(1), [data.shape[1]] * len(part), fold)
    return moments


def measured(
    data: np.ndarray, *, folds: int = 8, centered: bool = True, distinct_contexts: int = MANY, at_most: float | None = None
) -> Spectrum:
    """The spectrum of [sequences, length, width]."""
    moments = moments_of(data, folds)
    return measure(PLACE, moments, centered=centered, distinct_contexts=distinct_contexts, at_most=at_most)
