"""The transform of `eigen`: one basis over many heads and layers in a block-diagonal metric (THEORY 5).

y = Uᵀ M^{1/2} (x − μ), x̂ = μ + M^{−1/2} U y for the r coefficients that are kept. Only D = Uᵀ M^{−1/2} is held, in
float16 with a scale per row, and M itself, a small block per head: Uᵀ M^{1/2} = D M.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from eigencache.spectral.metric import block_product


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
        """y / step [..., coefficients] of vectors less their mean [..., width], float32."""
        x = block_product(x, _alike(self.metrics))
        return _beside([x[..., b.start : b.stop] @ b.decoder(1 / step).mT for b in self.bases])

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
