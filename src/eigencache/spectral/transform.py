"""The Karhunen–Loève transform in a metric: truncation to rank r costs exactly Σ_{i>r} Λ_i (THEORY 5).

With the covariance C and the metric M, M^{1/2} C M^{1/2} = U Λ Uᵀ. Encoding is y = Uᵀ M^{1/2} (x − μ), decoding
x̂ = μ + M^{−1/2} U ŷ. Then ‖y − ŷ‖² is the cost of the error and Λ its spectrum. M = I is PCA.

Dead dimensions, which never vary, are outside of the transform: they take no coefficient and are decoded as their mean.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from eigencache.errors import StatisticsError
from eigencache.spectral.metric import roots
from eigencache.spectral.moments import SecondOrder
from eigencache.spectral.spectrum import dead_dimensions, eigenbasis_of


@dataclass(frozen=True, eq=False)
class Transform:
    """A fitted transform.

    Attributes:
        mean: μ [p].
        encoder: M^{1/2} U [p, r].
        decoder: Uᵀ M^{−1/2} [r, p].
        spectrum: Λ, all p eigenvalues in the metric, descending; those of dead dimensions are zero.
    """

    mean: Tensor
    encoder: Tensor
    decoder: Tensor
    spectrum: Tensor

    @property
    def rank(self) -> int:
        """Number of coefficients per vector, r."""
        return self.encoder.shape[1]

    @property
    def width(self) -> int:
        """Dimension of a vector, p."""
        return self.encoder.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes of mean, encoder and decoder."""
        return self.mean.nbytes + self.encoder.nbytes + self.decoder.nbytes

    def truncated(self, rank: int) -> "Transform":
        """Return the transform with the leading `rank` coefficients.

        Raises:
            StatisticsError: `rank` is not between 1 and the rank of the transform.
        """
        if not 1 <= rank <= self.rank:
            raise StatisticsError(f"rank {rank} is out of range: this transform has ranks 1 to {self.rank}")
        return Transform(self.mean, self.encoder[:, :rank].contiguous(), self.decoder[:rank].contiguous(), self.spectrum)

    def encode(self, x: Tensor) -> Tensor:
        """Return the coefficients [..., r] of vectors [..., p], in the dtype of the transform."""
        return (x.to(self.mean.dtype) - self.mean) @ self.encoder

    def decode(self, y: Tensor) -> Tensor:
        """Return the vectors [..., p] of coefficients [..., r], in the dtype of the transform."""
        return y.to(self.mean.dtype) @ self.decoder + self.mean

    def to(self, dtype: torch.dtype, device: str | torch.device = "cpu") -> "Transform":
        """Return a copy in another dtype and on another device; default: the CPU."""
        return Transform(*(getattr(self, f).to(device, dtype) for f in ("mean", "encoder", "decoder", "spectrum")))


def fit_transform(
    moments: SecondOrder, *, metric: Tensor | None = None, alpha: float = 1.0, centered: bool = True
) -> Transform:
    """Fit the transform with one coefficient per dimension that varies, in float64.

    Args:
        moments: Moments of the calibration vectors.
        metric: M [p, p], positive definite; default: the Frobenius norm.
        alpha: Exponent of the metric.
        centered: Subtract the mean if true; use the second moment about zero otherwise.

    Raises:
        StatisticsError: There are not more vectors than dimensions, or the moments are not finite.
    """
    matrix = moments.covariance if centered else moments.second_moment
    width = len(matrix)
    if moments.count <= width:
        raise StatisticsError(
            f"{moments.count:.0f} vectors are too few for a basis of {width} dimensions: give more calibration text"
        )
    if not matrix.isfinite().all():
        raise StatisticsError(
            "the moments contain NaN or infinite values: the model overflows on the calibration text; try `dtype` float32"
        )
    mean = moments.mean if centered else torch.zeros_like(moments.mean)
    live = _live(matrix, moments)
    matrix = matrix[live][:, live]
    if metric is None:
        eigenvalues, basis = eigenbasis_of(matrix)
        return _embedded(mean, live, basis, basis.mT, eigenvalues)
    root, inverse = roots(metric[live][:, live], alpha)
    eigenvalues, basis = eigenbasis_of(root @ matrix @ root)
    return _embedded(mean, live, root @ basis, (inverse @ basis).mT, eigenvalues)


def _live(matrix: Tensor, moments: SecondOrder) -> Tensor:
    """Return the dimensions [r] that vary by `matrix`, a covariance or second moment; the first one if none does."""
    live = (~dead_dimensions(matrix.diagonal(), moments.second_moment.diagonal())).nonzero().flatten()
    return live if len(live) else live.new_zeros(1)


def _embedded(mean: Tensor, live: Tensor, encoder: Tensor, decoder: Tensor, spectrum: Tensor) -> Transform:
    """Return the transform of all dimensions [p] from that of the dimensions `live` [r], zero in all others."""
    width = len(mean)
    whole = encoder.new_zeros(width, len(live)), decoder.new_zeros(len(live), width), spectrum.new_zeros(width)
    whole[0][live], whole[1][:, live], whole[2][: len(live)] = encoder, decoder, spectrum
    return Transform(mean, *whole)


def random_transform(moments: SecondOrder, seed: int) -> Transform:
    """Return a random orthonormal basis of the dimensions that vary, about the same mean, as a control.

    Args:
        moments: Moments of the calibration vectors.
        seed: Seed of the basis.
    """
    covariance = moments.covariance
    live = _live(covariance, moments)
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(len(live), len(live), generator=generator, dtype=torch.float64)
    basis = torch.linalg.qr(noise).Q.to(moments.mean.device)
    spectrum = (basis * (covariance[live][:, live] @ basis)).sum(0)
    return _embedded(moments.mean, live, basis, basis.mT, spectrum)
