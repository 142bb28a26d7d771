"""What positions add to vectors that know no rotation: the mean of each, cut to the directions that are not noise."""

from collections.abc import Sequence

import torch
from torch import Tensor

from eigencache.calibration.vectors import SampledVectors
from eigencache.codec.eigen.position_means import PositionMeans
from eigencache.spectral.metric import block_product

_ROWS = 8192  # vectors at a time
_NOISE = 4.0  # times the variance by chance: the Marchenko–Pastur edge for as many dimensions as positions


def fit_positions(samples: SampledVectors, roots: Sequence[Tensor], inverses: Sequence[Tensor]) -> PositionMeans | None:
    """Means by position of `samples`, which are centered, in the directions in which they are more than chance; or none.

    `roots`, `inverses`: blocks of M^{1/2} and M^{−1/2}. Cost: O(n width).
    """
    positions, count = samples.positions, max(samples.lengths)
    seen = torch.bincount(positions, minlength=count)[:, None]
    means = torch.zeros(count, samples.layout.width).index_add_(0, positions, samples.vectors) / seen
    left, singular, directions = torch.linalg.svd(block_product(means, roots).double(), full_matrices=False)
    rest = torch.zeros_like(singular)
    for x, at in zip(samples.vectors.split(_ROWS), positions.split(_ROWS), strict=True):
        rest += (block_product(x - means[at], roots) @ directions.mT.float()).double().square().sum(0)
    chance = rest / max(1, len(positions) - count) * float((1 / seen).sum())
    kept = singular.square() > _NOISE * chance
    if not kept.any():
        return None
    rows = block_product(directions[kept].float(), inverses)
    largest = rows.abs().amax(1)
    return PositionMeans((left[:, kept] * (singular[kept] * largest)).half(), (rows / largest[:, None]).half())
