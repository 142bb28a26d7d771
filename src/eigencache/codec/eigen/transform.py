"""The transform of `eigen`: one basis over many heads and layers in a block-diagonal metric (THEORY 5).

x̂ = μ + Dᵀ y with D = Uᵀ M^{−1/2} for the r coefficients that are kept. Only D is stored, in float16 with a scale per row,
and M, a small block per head. Rounded to float16, the rows of D are no longer orthonormal in M, so y = D M (x − μ) would
not be the best y for them. The encoder solves the least-squares problem of the rounded rows: (D M Dᵀ) y = D M (x − μ).
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
        """Row by row, as it is saved: in another order the same numbers multiply to other last bits."""
        object.__setattr__(self, "rows", self.rows.contiguous())

    @classmethod
    def of(cls, start: int, decoder: Tensor) -> "Basis":
        """Of D [r, columns] in any precision; the largest number of every row becomes 1 in float16."""
        scale = decoder.abs().amax(1).clamp_min(torch.finfo(torch.float32).tiny).float()
        return cls(start, start + decoder.shape[1], (decoder / scale[:, None]).half(), scale)

    def decoder(self, step: float) -> Tensor:
        """D · step in float32 [r, columns]."""
        return self.rows.float() * (self.scale * step)[:, None]


@dataclass(frozen=True, eq=False)
class JointTransform:
    """`mean` [width], `bases` over columns, `metrics` [heads, dim, dim] one after the other; none is Frobenius."""

    mean: Tensor
    bases: tuple[Basis, ...]
    metrics: tuple[Tensor, ...] = ()

    def __post_init__(self) -> None:
        """Row by row, as `Basis`."""
        object.__setattr__(self, "metrics", tuple(m.contiguous() for m in self.metrics))

    @property
    def coefficients(self) -> int:
        """How many numbers a vector becomes."""
        return sum(len(b.rows) for b in self.bases)

    def tensors(self) -> Iterable[Tensor]:
        """All that is held."""
        yield self.mean
        for basis in self.bases:
            yield from (basis.rows, basis.scale)
        yield from self.metrics

    def to(self, device: str | torch.device) -> "JointTransform":
        """The same where the cache is."""
        bases = tuple(replace(b, rows=b.rows.to(device), scale=b.scale.to(device)) for b in self.bases)
        return JointTransform(self.mean.to(device), bases, tuple(m.to(device) for m in self.metrics))

    def encode(self, x: Tensor, step: float) -> Tensor:
        """The y / step [..., coefficients], float32, that decode to the nearest of vectors less their mean [..., width].

        Raises `CodecError` for a basis whose rows depend on each other.
        """
        return _beside([x[..., b.start : b.stop] @ e.mT / step for b, e in zip(self.bases, self._encoders, strict=True)])

    @cached_property
    @constant
    def _encoders(self) -> list[Tensor]:
        """(D M Dᵀ)⁻¹ D M of every basis [r, columns]: least squares on the rows as they are stored, in the metric."""
        return [self._encoder(basis) for basis in self.bases]

    def _encoder(self, basis: Basis) -> Tensor:
        decoder = basis.decoder(1.0)
        wide = decoder.new_zeros(len(decoder), len(self.mean))
        wide[:, basis.start : basis.stop] = decoder
        weighed = block_product(wide, _alike(self.metrics))[:, basis.start : basis.stop]
        factor, failed = torch.linalg.cholesky_ex(weighed @ decoder.mT)
        pivots = factor.diagonal()
        if failed or (len(pivots) and pivots.min() < _DEPENDENT * pivots.max()):
            raise CodecError(
                f"the basis of columns {basis.start} to {basis.stop} has rows that depend on each other: fit again"
            )
        return torch.cholesky_solve(weighed, factor)

    def decode(self, y: Tensor, step: float) -> Tensor:
        """Vectors less their mean [..., width] of y / step."""
        columns = [
            c @ b.decoder(step) for b, c in zip(self.bases, y.split([len(b.rows) for b in self.bases], -1), strict=True)
        ]
        return _beside(columns)


def _alike(metrics: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The same blocks in as few tensors as can be: one product for all heads of one width."""
    return (torch.cat(metrics),) if len({m.shape[1:] for m in metrics}) == 1 else metrics


def _beside(columns: list[Tensor]) -> Tensor:
    return columns[0] if len(columns) == 1 else torch.cat(columns, -1)
