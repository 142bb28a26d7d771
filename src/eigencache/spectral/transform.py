"""The Karhunen–Loève transform in a metric: truncation to rank r loses exactly Σ_{i>r} Λ_i of the cost (THEORY 5).

With C the covariance and M the metric, M^{1/2} C M^{1/2} = U Λ Uᵀ; encode y = Uᵀ M^{1/2} (x − μ), decode
x̂ = μ + M^{−1/2} U ŷ. Then ‖y − ŷ‖² is the cost of the error, and Λ the spectrum that matters. M = I is PCA.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from eigencache.errors import StatisticsError
from eigencache.spectral.metric import roots
from eigencache.spectral.moments import SecondOrder
from eigencache.spectral.spectrum import eigenbasis_of


@dataclass(frozen=True, eq=False)
class Transform:
    """A fitted transform: `mean` [p], `encoder` [p, r], `decoder` [r, p] and all p eigenvalues of the cost."""

    mean: Tensor
    encoder: Tensor
    decoder: Tensor
    spectrum: Tensor

    @property
    def rank(self) -> int:
        """How many coefficients a vector becomes."""
        return self.encoder.shape[1]

    @property
    def width(self) -> int:
        """Numbers of a vector."""
        return self.encoder.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes of what both sides must hold: mean, encoder, decoder."""
        return self.mean.nbytes + self.encoder.nbytes + self.decoder.nbytes

    def truncated(self, rank: int) -> "Transform":
        """The leading `rank` coefficients. Raises `StatisticsError` for a rank that does not exist."""
        if not 1 <= rank <= self.rank:
            raise StatisticsError(f"rank {rank}: this transform has ranks 1 to {self.rank}")
        return Transform(self.mean, self.encoder[:, :rank].contiguous(), self.decoder[:rank].contiguous(), self.spectrum)

    def encode(self, x: Tensor) -> Tensor:
        """Coefficients [..., r] of vectors [..., p], in the transform's dtype."""
        return (x.to(self.mean.dtype) - self.mean) @ self.encoder

    def decode(self, y: Tensor) -> Tensor:
        """Vectors [..., p] of coefficients [..., r]."""
        return y.to(self.mean.dtype) @ self.decoder + self.mean

    def to(self, dtype: torch.dtype, device: str | torch.device = "cpu") -> "Transform":
        """The same in another dtype or place."""
        return Transform(*(getattr(self, f).to(device, dtype) for f in ("mean", "encoder", "decoder", "spectrum")))


def fit_transform(
    moments: SecondOrder, *, metric: Tensor | None = None, alpha: float = 1.0, centered: bool = True
) -> Transform:
    """The transform of all p coefficients, in float64. `metric` [p, p] positive definite; None is Frobenius.

    Raises `StatisticsError` where there are fewer vectors than dimensions, or the moments are not finite.
    """
    matrix = moments.covariance if centered else moments.second_moment
    width = len(matrix)
    if moments.count <= width:
        raise StatisticsError(f"{moments.count:.0f} vectors cannot carry a basis of {width} dimensions: give more text")
    if not matrix.isfinite().all():
        raise StatisticsError("the moments hold NaN or infinite values: the calibration text broke the model")
    mean = moments.mean if centered else torch.zeros_like(moments.mean)
    if metric is None:
        eigenvalues, basis = eigenbasis_of(matrix)
        return Transform(mean, basis, basis.mT.contiguous(), eigenvalues)
    root, inverse = roots(metric, alpha)
    eigenvalues, basis = eigenbasis_of(root @ matrix @ root)
    return Transform(mean, root @ basis, (inverse @ basis).mT.contiguous(), eigenvalues)


def random_transform(moments: SecondOrder, seed: int) -> Transform:
    """A random orthonormal basis about the same mean: what any basis would give, as a control."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(len(moments.mean), len(moments.mean), generator=generator, dtype=torch.float64)
    basis = torch.linalg.qr(noise).Q.to(moments.mean.device)
    spectrum = (basis * (moments.covariance @ basis)).sum(0)
    return Transform(moments.mean, basis, basis.mT.contiguous(), spectrum)
