"""Fit a transform of all layers from a sample, where they are too wide for a matrix of moments.

A basis needs 10 independent vectors for each of its directions. A sample rarely has that many for all dimensions, so the
transform has fewer directions: the leading ones.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from eigencache.errors import StatisticsError
from eigencache.spectral.measure import DOUBTFUL_BELOW, LEADING, effective_vectors
from eigencache.spectral.metric import block_product, regularized_blocks, roots
from eigencache.spectral.moments import Moments
from eigencache.spectral.spectrum import dead_dimensions, eigenbasis_of, variances_and_mean_squares
from eigencache.spectral.transform import Transform
from eigencache.spectral.wide import DECOMPOSED, Sample


def fit_wide_transform(
    sample: Sample, blocks: Sequence[Tensor], *, alpha: float, centered: bool, contexts: int
) -> tuple[Transform, float]:
    """Fit the transform of the leading directions, as many as a tenth of the independent vectors.

    Args:
        sample: calibration vectors; of more dimensions than can be decomposed, some are left out.
        blocks: diagonal blocks of the metric, one [dim, dim] per head; empty for the Frobenius norm.
        alpha: exponent of the metric.
        centered: subtract the mean if true; use the second moment about zero otherwise.
        contexts: distinct contexts of the calibration text, an upper bound of the independent vectors.

    Returns:
        The transform in float32, and the number of independent vectors.

    Raises:
        StatisticsError: the vectors are too few for one direction, or the metric is zero or not finite.
    """
    sample = sample if sample.x.shape[1] <= DECOMPOSED else sample.thinned(DECOMPOSED)
    mean = sample.x.mean(0, dtype=torch.float64).float()
    mean = mean if centered else torch.zeros_like(mean)
    variances, squares = variances_and_mean_squares(sample.x.split(DECOMPOSED))
    live = ~dead_dimensions(variances if centered else squares, squares)
    weights, inverses = _roots(blocks, alpha, live)
    z = block_product(sample.x - mean, weights) * live
    n, width = z.shape
    space = None
    if n < width:
        space, r = torch.linalg.qr(z.mT)
        z = r.mT
    values, basis = eigenbasis_of((z.mT @ z) / n)
    independent = min(_effective(z @ basis[:, :LEADING], sample.lengths), contexts)
    rank = min(int(independent / DOUBTFUL_BELOW), int((values > 0).sum()))
    if rank < 1:
        raise StatisticsError(
            f"{independent:,.0f} independent vectors are too few for a basis of all layers: {DOUBTFUL_BELOW} are needed for "
            "each direction. Use more calibration tokens or a narrower scope."
        )
    basis = basis[:, :rank] if space is None else space @ basis[:, :rank]
    spectrum = torch.nn.functional.pad(values, (0, width - len(values)))
    encoder, decoder = (block_product(basis.mT, m) for m in (weights, inverses))
    return Transform(mean, encoder.mT.contiguous(), decoder.contiguous(), spectrum), independent


def _roots(blocks: Sequence[Tensor], alpha: float, live: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Return the blocks of M^{α/2} and of its inverse [1, dim, dim], zero in rows and columns that are not live."""
    both: tuple[list[Tensor], list[Tensor]] = [], []
    used = live.cpu().split(list(map(len, blocks))) if blocks else ()
    for block, alive in zip(regularized_blocks(list(blocks)) if blocks else (), used, strict=True):
        rows = alive.nonzero().flatten()
        for result, root in zip(both, roots(block.cpu()[rows][:, rows], alpha) if len(rows) else (None, None), strict=True):
            whole = torch.zeros(1, len(block), len(block))
            if root is not None:
                whole[0, rows[:, None], rows] = root.float()
            result.append(whole)
    return both


def _effective(leading: Tensor, lengths: Sequence[int]) -> float:
    """Return the effective number of vectors, from their leading coefficients [n, r]."""
    moments = Moments(leading.shape[1])
    moments.update(leading.unsqueeze(1), lengths)
    total = moments.total()
    eigenvalues, basis = eigenbasis_of(total.covariance)
    return effective_vectors(moments, total, basis, eigenvalues) or total.count
