"""Fit the mean vector of every position, for models without rotation, in the directions that exceed sampling noise."""

from collections.abc import Sequence

import torch
from torch import Tensor

from eigencache.calibration.vectors import SampledVectors
from eigencache.codec.eigen.position_means import PositionMeans
from eigencache.spectral.metric import block_product

_ROWS = 8192  # vectors per product
_NOISE = 4.0  # multiple of the noise variance: the Marchenko–Pastur edge for as many dimensions as positions


def fit_positions(samples: SampledVectors, roots: Sequence[Tensor], inverses: Sequence[Tensor]) -> PositionMeans | None:
    """Fit the means by position, or return None if they do not exceed sampling noise. Cost: O(n width).

    Args:
        samples: vectors of whole sequences.
        roots: blocks of M^{1/2} per part.
        inverses: blocks of M^{−1/2} per part.
    """
    positions, count = samples.positions, max(samples.lengths)
    seen = torch.bincount(positions, minlength=count)[:, None]
    center, means = samples.mean, torch.zeros(count, samples.layout.width)
    pieces = torch.arange(len(samples)).split(_ROWS)
    for rows in pieces:
        means.index_add_(0, positions[rows], samples.vectors(rows) - center)
    means /= seen
    left, singular, directions = torch.linalg.svd(block_product(means, roots).double(), full_matrices=False)
    residual = torch.zeros_like(singular)
    for rows in pieces:
        x = samples.vectors(rows) - center - means[positions[rows]]
        residual += (block_product(x, roots) @ directions.mT.float()).double().square().sum(0)
    noise = residual / max(1, len(positions) - count) * float((1 / seen).sum())
    kept = singular.square() > _NOISE * noise
    if not kept.any():
        return None
    rows = block_product(directions[kept].float(), inverses)
    largest = rows.abs().amax(1)
    return PositionMeans((left[:, kept] * (singular[kept] * largest)).half(), (rows / largest[:, None]).half())
