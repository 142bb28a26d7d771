"""The transform of `eigen`: vectors in the metric of the loss, cut into stages, each predicted from the one before.

z = (x − μ) R with R = M^{α/2}: the squared length of an error of z is its cost in the metric (THEORY 5). A stage is a range
of columns of z. Its decoded columns are ẑ_g = ẑ_{g−1} W_g + y_g D_g: what the stage before predicts, plus the coefficients
y_g of the rest in the rows of D_g. The encoder predicts from decoded columns too, so errors do not add up (closed loop).

Stored are R⁻¹, a small block per head, W in 8 bits, and D in 8 bits, or in 16 for coefficients so large that the rounding
would show. Rounded rows are no longer orthonormal, so the encoder solves for the y whose decoded columns are nearest.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from eigencache.codec.eigen.quantizer import DeadZone
from eigencache.codec.row_major import RowMajor
from eigencache.errors import CodecError
from eigencache.modes import constant
from eigencache.spectral.metric import block_product, blocks_between, inverted

_DEPENDENT = 1e-3  # of the largest pivot of D Dᵀ, which is near I
_INT8 = 127


def to_int8(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Round rows [n, m] to int8 and a float32 scale per row [n], the largest magnitude of a row being 127."""
    scale = (rows.abs().amax(1) / _INT8).clamp_min(torch.finfo(torch.float32).tiny).float()
    return (rows / scale[:, None]).round().to(torch.int8), scale


@dataclass(frozen=True, eq=False)
class Prediction(RowMajor):
    """Predicts the columns of a stage from the decoded columns of the stage before.

    Args:
        codes: Weights int8 [width, width before].
        scale: Unit of every row of `codes`, float32 [width].
        spread: What the columns before are divided by, float32 [width before].
    """

    codes: Tensor
    scale: Tensor
    spread: Tensor

    @classmethod
    def of(cls, weights: Tensor, spread: Tensor) -> "Prediction":
        """Round weights [width before, width] of columns that were divided by `spread` [width before]."""
        return cls(*to_int8(weights.mT), spread.float())

    @cached_property
    @constant
    def weights(self) -> Tensor:
        """W [width before, width] in float32."""
        return ((self.codes.float() * self.scale[:, None]) / self.spread).mT.contiguous()


@dataclass(frozen=True, eq=False)
class Stage(RowMajor):
    """The columns start … stop − 1 of a vector, and how they are decoded.

    Args:
        start: First column.
        stop: End of the columns, exclusive.
        fine: First rows of D in float16 [f, stop − start].
        coarse: The other rows of D in int8 [c, stop − start].
        scale: Unit of every row, float32 [f + c].
        prediction: Predicts the columns from the stage before; None: nothing does.
    """

    start: int
    stop: int
    fine: Tensor
    coarse: Tensor
    scale: Tensor
    prediction: Prediction | None = None

    @classmethod
    def of(cls, start: int, rows: Tensor, fine: int = 0, prediction: Prediction | None = None) -> "Stage":
        """Round D.

        Args:
            start: First column that D covers.
            rows: D [r, columns] in any precision.
            fine: Number of first rows to store in 16 bits; the others take 8.
            prediction: Predicts the columns from the stage before.
        """
        largest = rows[:fine].abs().amax(1).clamp_min(torch.finfo(torch.float32).tiny).float()
        coarse, unit = to_int8(rows[fine:])
        half = (rows[:fine] / largest[:, None]).half()
        return cls(start, start + rows.shape[1], half, coarse, torch.cat([largest, unit]), prediction)

    def __len__(self) -> int:
        """Return the number of coefficients."""
        return len(self.scale)

    @cached_property
    @constant
    def rows(self) -> Tensor:
        """D [r, columns] in float32."""
        return torch.cat([self.fine.float(), self.coarse.float()]) * self.scale[:, None]

    @cached_property
    @constant
    def encoder(self) -> Tensor:
        """Dᵀ (D Dᵀ)⁻¹ [columns, r]. Raises `CodecError` if the rows are linearly dependent."""
        factor, failed = torch.linalg.cholesky_ex(self.rows @ self.rows.mT)
        pivots = factor.diagonal()
        if failed or (len(pivots) and pivots.min() < _DEPENDENT * pivots.max()):
            raise CodecError(
                f"the basis of columns {self.start} to {self.stop} has linearly dependent rows: fit the codec again"
            )
        return torch.cholesky_solve(self.rows, factor).mT.contiguous()

    def expected(self, before: Tensor | None) -> Tensor | float:
        """Return what is predicted for the columns [..., stop − start], from the decoded stage before."""
        return 0.0 if self.prediction is None or before is None else before @ self.prediction.weights


@dataclass(frozen=True, eq=False)
class StagedTransform:
    """Vectors ⇄ integers, stage by stage.

    Args:
        mean: Mean vector μ [width].
        stages: Cover all columns in order.
        inverse_roots: Blocks of R⁻¹ [heads, dim, dim] in float16 or float32, in the order of the columns; empty: R = I.
    """

    mean: Tensor
    stages: tuple[Stage, ...]
    inverse_roots: tuple[Tensor, ...] = ()

    def __post_init__(self) -> None:
        """Make the blocks contiguous, as `RowMajor` does."""
        object.__setattr__(self, "inverse_roots", tuple(block.contiguous() for block in self.inverse_roots))

    @property
    def coefficients(self) -> int:
        """Number of coefficients."""
        return sum(map(len, self.stages))

    def tensors(self) -> Iterable[Tensor]:
        """Yield all tensors."""
        yield self.mean
        for stage in self.stages:
            yield from stage.tensors()
        yield from self.inverse_roots

    def to(self, device: str | torch.device) -> "StagedTransform":
        """Return the transform on `device`."""
        stages = tuple(stage.to(device) for stage in self.stages)
        return replace(
            self, mean=self.mean.to(device), stages=stages, inverse_roots=tuple(b.to(device) for b in self.inverse_roots)
        )

    def weighed(self, centered: Tensor) -> Tensor:
        """Return z = (x − μ) R [..., width] of centered vectors."""
        return block_product(centered, self._roots)

    def centered(self, z: Tensor, start: int = 0) -> Tensor:
        """Return x − μ = z R⁻¹ [..., columns] for the columns from `start` on, which are those of whole heads."""
        return block_product(z, blocks_between(self._inverses, start, start + z.shape[-1]))

    def quantize(self, z: Tensor, step: float, quantizer: DeadZone, first: Tensor | None = None) -> Tensor:
        """Return the integers of vectors.

        Args:
            z: Vectors in the metric [..., width].
            step: Quantization step.
            quantizer: Thresholds and reconstruction points of all coefficients.
            first: What is predicted for the columns of the first stage; None: nothing.

        Returns:
            Int32 [..., coefficients].

        Raises:
            CodecError: The rows of a stage are linearly dependent, or a coefficient is NaN or too large.
        """
        integers, before = [], None
        for stage, part in self._parts(quantizer):
            expected = stage.expected(before) if integers or first is None else first
            q = part.quantize((z[..., stage.start : stage.stop] - expected) @ stage.encoder / step)
            integers.append(q)
            before = expected + (part.dequantize(q) * step) @ stage.rows
        return torch.cat(integers, -1)

    def dequantize(self, integers: Tensor, step: float, quantizer: DeadZone, first: Tensor | None = None) -> Tensor:
        """Return the decoded vectors z [..., width] of integers [..., coefficients]; arguments are those of `quantize`."""
        return torch.cat([z for _, z in self.dequantized(integers, step, quantizer, first)], -1)

    def dequantized(
        self, integers: Tensor, step: float, quantizer: DeadZone, first: Tensor | None = None
    ) -> Iterator[tuple[Stage, Tensor]]:
        """Yield every stage with its decoded columns of z [..., stop − start]; arguments are those of `quantize`."""
        before: Tensor | None = None
        pieces = integers.split([len(stage) for stage in self.stages], -1)
        for (stage, part), q in zip(self._parts(quantizer), pieces, strict=True):
            expected = stage.expected(before) if before is not None else 0.0 if first is None else first
            before = (part.dequantize(q) * step) @ stage.rows + expected
            yield stage, before

    def _parts(self, quantizer: DeadZone) -> Iterator[tuple[Stage, DeadZone]]:
        return zip(self.stages, quantizer.split([len(stage) for stage in self.stages]), strict=True)

    @cached_property
    @constant
    def _inverses(self) -> tuple[Tensor, ...]:
        return _joined(tuple(blocks.float() for blocks in self.inverse_roots))

    @cached_property
    @constant
    def _roots(self) -> tuple[Tensor, ...]:
        return inverted(self._inverses)


def _joined(blocks: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Return the blocks in one tensor if all heads have one width, so that one product serves all."""
    return (torch.cat(blocks),) if len({b.shape[1:] for b in blocks}) == 1 else blocks
