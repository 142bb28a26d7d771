"""What a linear operator does to a spectrum: of the identity, energy at rank r is exactly r/p and no rank is special.

An operator's singular values are gains. The energy of M is that of what M makes of white noise; how much of real
vectors a truncation of M keeps needs their covariance as well.
"""

import torch
from torch import Tensor

from eigencache.records.adapter import Operator
from eigencache.spectral import spectrum as sp
from eigencache.spectral.transform import Transform

_UNIT = 1e-9  # a gain nearer to 1 than this is 1: M is built of float32 weights in float64


def operator_transform(matrix: Tensor, mean: Tensor | None = None) -> Transform:
    """The SVD of M = U S Vᵀ as a transform of M x: its r leading coefficients are S_r V_rᵀ x, and U_r decodes them.

    U_r U_rᵀ M x = U_r S_r V_rᵀ x, so a cache that is given M x encodes with U_r and decodes with U_rᵀ.
    `matrix` [p, p], float64. `mean` [p]: subtracted before and added afterwards; None: about zero, as M itself works.
    """
    left, gains, _ = torch.linalg.svd(matrix)
    mean = torch.zeros(len(matrix), dtype=matrix.dtype) if mean is None else mean.to(matrix)
    return Transform(mean, left, left.mT.contiguous(), gains.square())


def kept_shares(svd: Transform, pca: Transform) -> Tensor:
    """The share of variance in the leading r directions of an orthonormal `svd`, r = 1 … p: [p], ending in 1.

    `pca` holds the vectors' covariance as its full basis and spectrum. By Ky Fan no basis keeps more than `pca` does.
    """
    svd, pca = (transform.to(torch.float64) for transform in (svd, pca))
    return sp.energy_shares((svd.encoder.mT @ pca.encoder).square() @ pca.spectrum)


def analyze(layer_idx: int, matrix: Tensor, frozen: Transform, adapted: Transform, ranks: list[int]) -> Operator:
    """Gains of M [p, p] beside variances: `frozen` and `adapted` are full PCAs of the vectors before and behind it."""
    width = len(matrix)
    svd = operator_transform(matrix)
    gains = svd.spectrum.sqrt()
    identity = torch.eye(width, dtype=matrix.dtype)
    points = sorted({r for r in (*sp.energy_points(width), *ranks) if r <= width})

    def at_points(shares: Tensor) -> dict[int, float]:
        return {r: float(shares[r - 1]) for r in points}

    return Operator(
        layer_idx=layer_idx,
        width=width,
        singular_values=gains.tolist(),
        unit_gains=int(((gains - 1).abs() < _UNIT).sum()),
        condition_number=sp.condition_number(svd.spectrum),
        energy=at_points(sp.energy_shares(svd.spectrum)),
        effective_rank=float(sp.effective_rank(svd.spectrum)),
        distance=float(torch.linalg.norm(matrix - identity) / torch.linalg.norm(identity)),
        variance_energy=at_points(sp.energy_shares(frozen.spectrum.double().cpu())),
        variance_kept=at_points(kept_shares(svd, adapted)),
    )
