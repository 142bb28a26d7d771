"""The transform of `eigen`: one basis over many heads and layers in a block-diagonal metric (THEORY 5).

x̂ = μ + Dᵀ y with D = Uᵀ M^{−1/2} for the r stored coefficients. Stored are D, in float16 with a scale per row, and M, a
small block per head. Rounded to float16, the rows of D are no longer orthonormal in M, and y = D M (x − μ) would not be the
best y for them. The encoder solves the least-squares problem of the rounded rows: (D M Dᵀ) y = D M (x − μ).
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from eigencache.errors import CodecError
from eigencache.modes import constant
from eigencache.spectral.metric import block_product

_DEPENDENT = 1e-3  # of the largest pivot of D M Dᵀ = I, which rounding to float16 changes by a thousandth


@dataclass(frozen=True, eq=False)
class Basis:
    """The coefficients of columns start … stop of a vector: `rows` [r, stop − start] float16, `scale` [r] float32."""

    start: int
    stop: int
    rows: Tensor
    scale: Tensor

    def __post_init__(self) -> None:
        """Make the rows contiguous, as they are saved: the memory order changes the last bits of a product."""
        object.__setattr__(self, "rows", self.rows.contiguous())

    @classmethod
    def of(cls, start: int, decoder: Tensor) -> "Basis":
        """Round D to float16.

        Args:
            start: First column of a vector that D covers.
            decoder: D [r, columns] in any precision; every row is scaled so that its largest magnitude is 1.
        """
        scale = decoder.abs().amax(1).clamp_min(torch.finfo(torch.float32).tiny).float()
        return cls(start, start + decoder.shape[1], (decoder / scale[:, None]).half(), scale)

    def decoder(self, step: float) -> Tensor:
        """Return D · step [r, columns] in float32."""
        return self.rows.float() * (self.scale * step)[:, None]


@dataclass(frozen=True, eq=False)
class JointTransform:
    """Vectors ⇄ coefficients.

    Args:
        mean: Mean vector [width].
        bases: Cover all columns in order.
        metrics: Blocks [heads, dim, dim] of the metric, in the order of the columns; empty: Frobenius.
    """

    mean: Tensor
    bases: tuple[Basis, ...]
    metrics: tuple[Tensor, ...] = ()

    def __post_init__(self) -> None:
        """Make the metrics contiguous, as `Basis` does with its rows."""
        object.__setattr__(self, "metrics", tuple(m.contiguous() for m in self.metrics))

    @property
    def coefficients(self) -> int:
        """Number of coefficients."""
        return sum(len(b.rows) for b in self.bases)

    def tensors(self) -> Iterable[Tensor]:
        """Yield all tensors."""
        yield self.mean
        for basis in self.bases:
            yield from (basis.rows, basis.scale)
        yield from self.metrics

    def to(self, device: str | torch.device) -> "JointTransform":
        """Return the transform on `device`."""
        bases = tuple(replace(b, rows=b.rows.to(device), scale=b.scale.to(device)) for b in self.bases)
        return JointTransform(self.mean.to(device), bases, tuple(m.to(device) for m in self.metrics))

    def encode(self, x: Tensor, step: float) -> Tensor:
        """Return the coefficients whose decoded vector is nearest in the metric.

        Args:
            x: Centered vectors [..., width].
            step: Quantization step.

        Returns:
            y / step in float32 [..., coefficients].

        Raises:
            CodecError: The rows of a basis are linearly dependent.
        """
        return _concat([x[..., b.start : b.stop] @ e.mT / step for b, e in zip(self.bases, self._encoders, strict=True)])

    @cached_property
    @constant
    def _encoders(self) -> list[Tensor]:
        """(D M Dᵀ)⁻¹ D M [r, columns] of every basis, from the stored rows."""
        return [self._encoder(basis) for basis in self.bases]

    def _encoder(self, basis: Basis) -> Tensor:
        decoder = basis.decoder(1.0)
        wide = decoder.new_zeros(len(decoder), len(self.mean))
        wide[:, basis.start : basis.stop] = decoder
        weighed = block_product(wide, _joined(self.metrics))[:, basis.start : basis.stop]
        factor, failed = torch.linalg.cholesky_ex(weighed @ decoder.mT)
        pivots = factor.diagonal()
        if failed or (len(pivots) and pivots.min() < _DEPENDENT * pivots.max()):
            raise CodecError(
                f"the basis of columns {basis.start} to {basis.stop} has linearly dependent rows: fit the codec again"
            )
        return torch.cholesky_solve(weighed, factor)

    def decode(self, y: Tensor, step: float) -> Tensor:
        """Return the centered vectors [..., width] of coefficients y / step."""
        columns = [
            c @ b.decoder(step) for b, c in zip(self.bases, y.split([len(b.rows) for b in self.bases], -1), strict=True)
        ]
        return _concat(columns)


def _joined(metrics: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Return the blocks in one tensor if all heads have one width, so that one product serves all."""
    return (torch.cat(metrics),) if len({m.shape[1:] for m in metrics}) == 1 else metrics


def _concat(columns: list[Tensor]) -> Tensor:
    return columns[0] if len(columns) == 1 else torch.cat(columns, -1)
