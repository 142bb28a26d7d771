"""Fit one stage of `eigen` at one step: the prediction from the stage before, a basis of the rest, and its quantizer.

Basis and prediction are fitted on most of the vectors, and quantizer and tables on others that the basis has not seen: a
basis overfits its own vectors, so their coefficients are smaller outside and larger inside it than those of other texts.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from eigencache.codec.eigen.quantizer import DeadZone, fit_class
from eigencache.codec.eigen.transform import Prediction, Stage
from eigencache.spectral.moments import add_gram, symmetric
from eigencache.spectral.spectrum import eigenbasis_of

_PER_OCTAVE = 4  # classes of coefficients per octave of their deviation
_NARROWEST = -4  # octaves below the step; all narrower coefficients share one class
_FINE = 8.0  # deviation in steps from which rounding a row to 8 bits adds more than a twentieth to the quantizer's error
_RIDGE = 1e-3  # penalty, as a share of the variance of a column that predicts
_ROWS = 8192  # vectors per product in float32; the sums are float64
_QUANTIZER_BITS = 4 * 32 + 32  # stored with a row: four numbers of the quantizer, and its scale


class Halves(NamedTuple):
    """Columns of the vectors that a basis is fitted on [n, columns], and of those for the quantizer and the tables."""

    fitted: Tensor
    apart: Tensor


class FittedStage(NamedTuple):
    """A stage with its quantizer."""

    stage: Stage  # prediction and basis
    quantizer: DeadZone  # thresholds and reconstruction points [r]
    classes: Tensor  # quarters of an octave of the deviation of every coefficient in steps [r]; the same in all stages
    symbols: Tensor  # integers of the vectors that the basis has not seen, int32 [n, r]
    decoded: Halves  # the decoded columns of both halves, for the next stage; empty if they are not wanted


def fit_stage(
    start: int,
    columns: Halves,
    told: Halves | None,
    before: Halves | None,
    step: float,
    tokens: int,
    basis: Tensor | None = None,
    *,
    decode: bool = True,
) -> FittedStage:
    """Fit a stage.

    Args:
        start: first column of the stage.
        columns: the columns of the vectors in the metric.
        told: what tokens predict for the columns of the first stage; None: nothing.
        before: the decoded columns of the stage before; None: it predicts nothing.
        step: quantization step.
        tokens: number of stored tokens that share the cost of a row.
        basis: basis of the columns if it is known already; it must not depend on the step.
        decode: decode the columns, for a stage that they predict.
    """
    prediction = None if before is None else _prediction(before.fitted, columns.fitted)
    expected = told
    if prediction is not None and before is not None:
        expected = Halves(*(x @ prediction.weights for x in before))
    rest = columns if expected is None else Halves(*(x - e for x, e in zip(columns, expected, strict=True)))
    basis = basis_of(rest.fitted) if basis is None else basis
    y = rest.apart @ basis / step
    deviations = y.square().mean(0).sqrt()
    classes = ((deviations + 1e-12).log2().clamp_min(_NARROWEST) * _PER_OCTAVE).round()
    values, class_of = classes.unique(return_inverse=True)
    fits = [fit_class(y[:, class_of == c].abs().flatten().numpy()) for c in range(len(values))]
    upkeep = (8 * len(basis) + _QUANTIZER_BITS) / tokens
    kept = torch.tensor([fit.gain > upkeep for fit in fits])[class_of].nonzero().flatten()
    numbers = torch.tensor([(f.dead_zone, f.offset, f.first, f.rest) for f in fits], dtype=torch.float32).view(len(fits), 4)
    quantizer = DeadZone(*numbers[class_of[kept]].T.contiguous())
    wide = (deviations[kept] > _FINE).nonzero().flatten()
    fine = int(wide[-1]) + 1 if len(wide) else 0
    stage = Stage.of(start, basis[:, kept].mT, fine, prediction)
    symbols = quantizer.quantize(rest.apart @ stage.encoder / step)
    decoded = Halves(torch.empty(0), torch.empty(0))
    if decode:
        decoded = Halves(*(_decoded(stage, quantizer, step, x) for x in rest))
        if expected is not None:
            decoded = Halves(*(x.add_(e) for x, e in zip(decoded, expected, strict=True)))
    return FittedStage(stage, quantizer, classes[kept], symbols, decoded)


def _decoded(stage: Stage, quantizer: DeadZone, step: float, rest: Tensor) -> Tensor:
    """Return what is left of `rest` [n, columns] after quantization, some thousand vectors at a time."""
    decoded = torch.empty_like(rest)
    for x, out in zip(rest.split(_ROWS), decoded.split(_ROWS), strict=True):
        torch.mm(quantizer.dequantize(quantizer.quantize(x @ stage.encoder / step)) * step, stage.rows, out=out)
    return decoded


def basis_of(vectors: Tensor) -> Tensor:
    """Return the Karhunen–Loève basis [columns, r] of vectors [n, columns], largest variance first (THEORY 5).

    Where there are fewer vectors than columns, the Gram matrix of the vectors is decomposed instead of the covariance. It
    gives the same leading directions, as many as there are vectors. Directions with a variance below 1e-9 of the largest
    are left out.
    """
    n, width = vectors.shape
    if width <= n:
        values, basis = eigenbasis_of(_gram(vectors))
    else:
        values, left = eigenbasis_of((vectors @ vectors.mT).double() / n)
        basis = torch.linalg.qr(vectors.mT.double() @ left).Q
    return basis[:, : int((values > 1e-9 * values[0]).sum())].float()


def _prediction(before: Tensor, columns: Tensor) -> Prediction:
    """Return the ridge regression of `columns` [n, c] on `before` [n, b], whose columns are scaled to unit variance."""
    gram = _gram(before)
    largest = gram.diagonal().max().clamp_min(torch.finfo(torch.float32).tiny)
    spread = gram.diagonal().clamp_min(1e-9 * largest).sqrt()
    scaled = gram / spread / spread[:, None] + _RIDGE * torch.eye(len(gram), dtype=gram.dtype)
    weights = torch.cholesky_solve(_products(before, columns) / spread[:, None], torch.linalg.cholesky(scaled))
    return Prediction.of(weights.float(), spread)


def _gram(x: Tensor) -> Tensor:
    """Return xᵀ x / n in float64 of x [n, p]; only products on or right of the diagonal are computed."""
    total = torch.zeros(1, x.shape[1], x.shape[1], dtype=torch.float64)
    for part in x.split(_ROWS):
        add_gram(total, part[:, None])
    return symmetric(total[0]) / len(x)


def _products(a: Tensor, b: Tensor) -> Tensor:
    """Return aᵀ b / n in float64 of a [n, p] and b [n, q]."""
    total = torch.zeros(a.shape[1], b.shape[1], dtype=torch.float64)
    for left, right in zip(a.split(_ROWS), b.split(_ROWS), strict=True):
        total += left.mT @ right
    return total / len(a)


def joined(stages: Sequence[FittedStage]) -> tuple[DeadZone, Tensor, Tensor]:
    """Return the quantizer of all stages, the table of every coefficient [r], and all integers [n, r]."""
    parts = zip(*((q.dead_zone, q.offset, q.first, q.rest) for q in (s.quantizer for s in stages)), strict=True)
    table_of = torch.cat([s.classes for s in stages]).unique(return_inverse=True)[1]
    return DeadZone(*map(torch.cat, parts)), table_of, torch.cat([s.symbols for s in stages], 1)
