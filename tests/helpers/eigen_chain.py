"""The chain of stages of `eigen` in NumPy and float64, computed from what is stored and apart from the code under test."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from eigencache.codec.eigen.quantizer import DeadZone
from eigencache.codec.eigen.token_features import Embed
from eigencache.codec.eigen.transform import Prediction, Stage, StagedTransform
from eigencache.codec.row_major import RowMajor


class Chain(NamedTuple):
    """`units`: coefficients in steps [n, coefficients]; `decoded`: vectors in the metric [n, width]."""

    units: np.ndarray
    decoded: np.ndarray


@dataclass(frozen=True, eq=False)
class TableFeatures(RowMajor):
    """Features of every rank in a table [vocabulary, h], in place of those of a model's embeddings."""

    table: Tensor

    @property
    def vocabulary(self) -> int:
        return len(self.table)

    @property
    def size(self) -> int:
        return self.table.shape[1]

    def of(self, ranks: Tensor) -> Tensor:
        return self.table[ranks].float()

    def of_model(self, embed: Embed) -> "TableFeatures":
        return self


def float64(x: Tensor) -> np.ndarray:
    return x.detach().numpy().astype(np.float64)


def rows_of(stage: Stage) -> np.ndarray:
    """D [r, columns] as it is stored."""
    return np.concatenate([float64(stage.fine), float64(stage.coarse)]) * float64(stage.scale)[:, None]


def weights_of(prediction: Prediction) -> np.ndarray:
    """W [width before, width] as it is stored."""
    return (float64(prediction.codes) * float64(prediction.scale)[:, None] / float64(prediction.spread)).T


def integers_of(units: np.ndarray, quantizer: DeadZone) -> np.ndarray:
    magnitude = np.abs(units)
    rounded = np.maximum(1, np.rint(magnitude - float64(quantizer.offset)))
    return (np.where(magnitude < float64(quantizer.dead_zone), 0, rounded) * np.sign(units)).astype(np.int64)


def points_of(integers: np.ndarray, quantizer: DeadZone) -> np.ndarray:
    magnitude = np.abs(integers)
    shift = np.where(magnitude == 1, float64(quantizer.first), float64(quantizer.rest))
    return np.sign(integers) * (magnitude - shift)


def chain(
    transform: StagedTransform,
    z: np.ndarray,
    step: float,
    quantizer: DeadZone,
    integers: np.ndarray,
    first: np.ndarray | None = None,
) -> Chain:
    """Return what a stage codes of z [n, width] where the stages before were coded as these integers, and what they say."""
    decoded: list[np.ndarray] = []
    units, points, at = [], points_of(integers, quantizer), 0
    for stage in transform.stages:
        columns, rows = z[:, stage.start : stage.stop], rows_of(stage)
        expected = np.zeros_like(columns)
        if not decoded and first is not None:
            expected = first
        elif decoded and stage.prediction is not None:
            expected = decoded[-1] @ weights_of(stage.prediction)
        units.append(np.linalg.lstsq(rows.T, (columns - expected).T, rcond=None)[0].T / step)
        decoded.append(expected + points[:, at : at + len(rows)] @ rows * step)
        at += len(rows)
    return Chain(np.concatenate(units, 1), np.concatenate(decoded, 1))


def assert_is_chain(
    transform: StagedTransform,
    z: Tensor,
    step: float,
    quantizer: DeadZone,
    first: Tensor | None = None,
    tolerance: float = 2e-3,
) -> Tensor:
    """Assert that integers and decoded vectors are those of NumPy, but for units within `tolerance` of a threshold.

    Returns:
        The integers [n, coefficients].
    """
    integers = transform.quantize(z, step, quantizer, first)
    assert integers.dtype == torch.int32 and integers.shape == (len(z), transform.coefficients)
    found = integers.numpy().astype(np.int64)
    expected = chain(transform, float64(z), step, quantizer, found, None if first is None else float64(first))
    least, most = (integers_of(expected.units + error, quantizer) for error in (-tolerance, tolerance))
    assert ((least <= found) & (found <= most)).all()
    assert (found != integers_of(expected.units, quantizer)).mean() < tolerance
    decoded = transform.dequantize(integers, step, quantizer, first)
    assert decoded.dtype == torch.float32
    np.testing.assert_allclose(decoded.numpy(), expected.decoded, rtol=1e-5, atol=3e-6 * np.abs(expected.decoded).max())
    return integers


def dead_zones(count: int) -> DeadZone:
    """Numbers in their ranges that differ between coefficients."""
    ranges = ((0.5, 0.9), (0.2, -0.1), (0.02, 0.15), (-0.05, 0.1))
    return DeadZone(*(torch.linspace(a, b, count) for a, b in ranges))


def plain(count: int) -> DeadZone:
    """Rounding to the nearest integer."""
    return DeadZone(torch.full((count,), 0.5), *torch.zeros(3, count))


def block_diagonal(blocks: Sequence[Tensor]) -> np.ndarray:
    """The matrix [p, p] of diagonal blocks [heads, dim, dim]."""
    return float64(torch.block_diag(*(block for part in blocks for block in part.double())))
