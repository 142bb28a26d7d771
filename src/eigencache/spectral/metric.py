"""Error metrics: symmetric positive matrices M, with the cost eᵀMe of an error e (THEORY 4).

All matrices are float64 [p, p]. Every metric is regularized before it is inverted, and the ε is recorded.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from eigencache.errors import StatisticsError
from eigencache.spectral.rope import Angles, Rotation, rotate, unrotate

EPSILON = 1e-3  # of the mean eigenvalue: the cost of directions that the calibration text never uses


def regularized(metric: Tensor, epsilon: float = EPSILON) -> Tensor:
    """Return M + ε tr(M)/p · I, which is positive definite for any positive semidefinite M other than zero.

    Args:
        metric: M [p, p], float64; it is symmetrized first.
        epsilon: ε, relative to the mean eigenvalue.

    Raises:
        StatisticsError: The metric contains NaN or infinite values, or its trace is not positive.
    """
    return regularized_blocks([metric], epsilon)[0]


def regularized_blocks(blocks: Sequence[Tensor], epsilon: float = EPSILON) -> list[Tensor]:
    """Return the diagonal blocks of the regularized block-diagonal matrix with the given blocks.

    Args:
        blocks: Diagonal blocks of M, each square, float64; they are symmetrized first.
        epsilon: ε, relative to the mean eigenvalue of all blocks.

    Raises:
        StatisticsError: A block contains NaN or infinite values, or the trace of all is not positive.
    """
    trace = sum(float(torch.trace(block)) for block in blocks)
    if not all(block.isfinite().all() for block in blocks) or trace <= 0:
        raise StatisticsError(
            f"the metric has a trace of {trace:.3g}, a positive one is required: the calibration gave no gradients"
        )
    added = epsilon * trace / sum(map(len, blocks))
    return [(b + b.mT) / 2 + added * torch.eye(len(b), dtype=b.dtype, device=b.device) for b in blocks]


def roots(metric: Tensor, alpha: float = 1.0) -> tuple[Tensor, Tensor]:
    """Return (M^{α/2}, M^{−α/2}), symmetric and inverse to each other.

    Args:
        metric: M [p, p], positive definite.
        alpha: Exponent α of the metric; 1 is the metric itself, 0 the Frobenius norm.
    """
    values, vectors = torch.linalg.eigh(metric)
    values = values.clamp_min(torch.finfo(values.dtype).tiny)
    return tuple((vectors * values.pow(power)) @ vectors.mT for power in (alpha / 2, -alpha / 2))  # type: ignore[return-value]


def lag_averaged(queries: Tensor, rotation: Rotation, lags: Tensor) -> Tensor:
    """Return E_Δ[R_Δ C_q R_Δᵀ], the metric of a key stored before rotation.

    A query Δ positions after the key gives the logit (R_Δ q)ᵀ k. Pairs that rotate fast therefore become isotropic and
    slow pairs keep their structure. THEORY 4.2 writes Δ with the opposite sign. Cost: one rotation of a d × d matrix for
    each lag of nonzero weight.

    Args:
        queries: C_q [d, d], the second moment of the queries before rotation.
        rotation: Rotation of the layer.
        lags: Weight of every lag Δ = 0, 1, … [lags]; normalized here.
    """
    used = (lags > 0).nonzero().flatten()
    share = (lags[used] / lags.sum()).to(queries.device, torch.float64)
    root = roots(regularized(queries.double(), 1e-12))[0]  # C = root rootᵀ: its rows replace the queries
    turned, back = (_per_lag(rotation.angles(n).to(queries.device)) for n in (used, torch.zeros_like(used)))
    rows = unrotate(rotate(root.expand(1, len(used), *root.shape), turned, rotation.pairing), back, rotation.pairing)[0]
    rows[..., : turned.rotary_dim] *= rotation.scale**2  # `unrotate` is the inverse of R, a logit needs the transpose
    return torch.einsum("l,lqi,lqj->ij", share, rows, rows)


def _per_lag(angles: Angles) -> Angles:
    """Return angles [1, lags, 1, pairs] in float64, with lags in the dimension of the heads."""
    return Angles(*(part.double().transpose(1, 2) for part in (angles.cos, angles.sin)))


def block_diagonal(metrics: list[Tensor]) -> Tensor:
    """Return the metric [Σp, Σp] of concatenated vectors, without cross terms between the parts."""
    return torch.block_diag(*metrics)


def block_product(x: Tensor, blocks: Sequence[Tensor]) -> Tensor:
    """Return x times a block-diagonal matrix.

    Args:
        x: Vectors [..., p].
        blocks: Diagonal blocks, each [heads, dim, dim], in order; their sizes add up to p. Empty: the identity.
    """
    if not blocks:
        return x
    columns = x.split([block.shape[0] * block.shape[1] for block in blocks], -1)
    products = [
        torch.einsum("...hd,hde->...he", part.unflatten(-1, block.shape[:2]), block).flatten(-2)
        for part, block in zip(columns, blocks, strict=True)
    ]
    return torch.cat(products, -1)


def blocks_between(blocks: Sequence[Tensor], start: int, stop: int) -> list[Tensor]:
    """Return the diagonal blocks of the rows start … stop − 1 of a block-diagonal matrix.

    Args:
        blocks: Its blocks, each [heads, dim, dim], in order. Empty: the identity.
        start: First row, at the border of a block.
        stop: End of the rows, exclusive, at the border of a block.

    Returns:
        Blocks [heads, dim, dim], neighbors of one width in one tensor.
    """
    chosen: list[Tensor] = []
    at = 0
    for block in blocks:
        heads, dim = block.shape[:2]
        first, last = (min(max((edge - at) // dim, 0), heads) for edge in (start, stop))
        if first < last:
            part = block[first:last]
            if chosen and chosen[-1].shape[1] == dim:
                chosen[-1] = torch.cat([chosen[-1], part])
            else:
                chosen.append(part)
        at += heads * dim
    return chosen


def inverted(blocks: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Return the inverse of every block in float32, computed in float64.

    Where a row and its column are zero, as of dead dimensions, they are zero in the inverse.
    """
    return tuple((torch.linalg.inv(completed(b.double())) - _units_of_zero_rows(b.double())).float() for b in blocks)


def completed(blocks: Tensor) -> Tensor:
    """Return blocks [heads, dim, dim] with 1 on the diagonal of every row of zeros."""
    return blocks + _units_of_zero_rows(blocks)


def _units_of_zero_rows(blocks: Tensor) -> Tensor:
    return torch.diag_embed((blocks == 0).all(-1).to(blocks))
