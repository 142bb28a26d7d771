"""What an error costs: symmetric positive matrices M with cost eᵀMe, and how they are made usable (THEORY 4).

All matrices are float64 [p, p]. Every metric is regularized before it is inverted, and the ε is recorded.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from eigencache.errors import StatisticsError
from eigencache.spectral.rope import Angles, Rotation, rotate, unrotate

EPSILON = 1e-3  # of the mean eigenvalue, added to every direction: what the calibration text never asks for still costs


def regularized(metric: Tensor, epsilon: float = EPSILON) -> Tensor:
    """M + ε tr(M)/p · I: positive definite for any positive semidefinite M that is not zero.

    Raises `StatisticsError` for a metric that holds NaN or whose trace is not positive.
    """
    trace = torch.trace(metric)
    if not metric.isfinite().all() or trace <= 0:
        raise StatisticsError(f"a metric of trace {float(trace):.3g} weighs nothing: the calibration gave no gradients")
    width = len(metric)
    return (metric + metric.mT) / 2 + epsilon * trace / width * torch.eye(width, dtype=metric.dtype, device=metric.device)


def roots(metric: Tensor, alpha: float = 1.0) -> tuple[Tensor, Tensor]:
    """(M^{α/2}, M^{−α/2}), symmetric, inverse to each other: α = 1 is the metric itself, 0 is Frobenius."""
    values, vectors = torch.linalg.eigh(metric)
    values = values.clamp_min(torch.finfo(values.dtype).tiny)
    return tuple((vectors * values.pow(power)) @ vectors.mT for power in (alpha / 2, -alpha / 2))  # type: ignore[return-value]


def lag_averaged(queries: Tensor, rotation: Rotation, lags: Tensor) -> Tensor:
    """E_Δ[R_Δ C_q R_Δᵀ] with weights `lags` [Δ = 0, 1, …]: the metric of a key stored before rotation.

    `queries`: C_q, the second moment of queries before rotation [d, d]. A query Δ positions after the key gives the
    logit (R_Δ q)ᵀ k, so pairs that turn fast become isotropic and slow ones keep their structure. THEORY 4.2 writes
    Δ with the other sign. Cost: one rotation of a d × d matrix per lag that has weight.
    """
    used = (lags > 0).nonzero().flatten()
    share = (lags[used] / lags.sum()).to(queries.device, torch.float64)
    root = roots(regularized(queries.double(), 1e-12))[0]  # C = root rootᵀ: its rows stand for the queries
    turned, back = (_per_lag(rotation.angles(n).to(queries.device)) for n in (used, torch.zeros_like(used)))
    rows = unrotate(rotate(root.expand(1, len(used), *root.shape), turned, rotation.pairing), back, rotation.pairing)[0]
    rows[..., : turned.rotary_dim] *= rotation.scale**2  # `unrotate` is the inverse; a logit has the transpose
    return torch.einsum("l,lqi,lqj->ij", share, rows, rows)


def _per_lag(angles: Angles) -> Angles:
    """Angles [1, lags, 1, pairs] in float64: a "head" for every lag."""
    return Angles(*(part.double().transpose(1, 2) for part in (angles.cos, angles.sin)))


def block_diagonal(metrics: list[Tensor]) -> Tensor:
    """The metric of concatenated vectors whose parts do not share a cost [Σp, Σp]."""
    return torch.block_diag(*metrics)


def block_product(x: Tensor, blocks: Sequence[Tensor]) -> Tensor:
    """x times a block-diagonal matrix, `blocks` [heads, dim, dim] one after the other; none is the identity. x [..., p]."""
    if not blocks:
        return x
    columns = x.split([block.shape[0] * block.shape[1] for block in blocks], -1)
    products = [
        torch.einsum("...hd,hde->...he", part.unflatten(-1, block.shape[:2]), block).flatten(-2)
        for part, block in zip(columns, blocks, strict=True)
    ]
    return torch.cat(products, -1)
