"""Spectral analysis of a linear operator M: its gains, and the variance of real vectors that a truncation of M retains.

The singular values of M are its gains. The energy of M is the energy of M x for white noise x; for the identity it is
exactly r/p at rank r. The retained variance of real vectors depends on their covariance as well.
"""

import torch
from torch import Tensor

from eigencache.records.adapter import Operator
from eigencache.spectral import spectrum as sp
from eigencache.spectral.transform import Transform

_UNIT = 1e-9  # gains within this distance of 1 count as 1: M is computed in float64 from float32 weights


def operator_transform(matrix: Tensor, mean: Tensor | None = None) -> Transform:
    """Return the SVD M = U S Vᵀ as a transform of vectors M x.

    U_rᵀ M x = S_r V_rᵀ x: a cache that stores M x encodes with U_r and decodes with U_rᵀ.

    Args:
        matrix: M [p, p], float64.
        mean: Mean [p], subtracted before encoding and added after decoding; default: zero.
    """
    left, gains, _ = torch.linalg.svd(matrix)
    mean = torch.zeros(len(matrix), dtype=matrix.dtype) if mean is None else mean.to(matrix)
    return Transform(mean, left, left.mT.contiguous(), gains.square())


def kept_shares(svd: Transform, pca: Transform) -> Tensor:
    """Return the share of variance in the leading r directions of an orthonormal basis, for r = 1 … p.

    By Ky Fan's theorem no basis retains more than `pca`.

    Args:
        svd: Transform with the orthonormal basis.
        pca: Full PCA of the vectors; its basis and spectrum represent their covariance.

    Returns:
        Shares [p], ascending to 1.
    """
    svd, pca = (transform.to(torch.float64) for transform in (svd, pca))
    return sp.energy_shares((svd.encoder.mT @ pca.encoder).square() @ pca.spectrum)


def analyze(layer_idx: int, matrix: Tensor, frozen: Transform, adapted: Transform, ranks: list[int]) -> Operator:
    """Measure the gains of an operator and the variance that its leading directions retain.

    Args:
        layer_idx: Layer of the operator.
        matrix: M [p, p], float64.
        frozen: Full PCA of the vectors x before the operator.
        adapted: Full PCA of the vectors M x after the operator.
        ranks: Ranks at which energies are recorded, in addition to powers of two.
    """
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
