"""A codec that predicts each layer from the decoded layer before and codes the residual.

docs/ablations.md compares it with the joint transform. Prediction is closed-loop: it uses the vectors that the decoder has.
The size is the ideal code length of the static tables without headers and coder states, which favors this codec.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from eigencache.calibration.calibration_set import CalibrationSet
from eigencache.codec.base import Cached, EncodedBytes, length_of
from eigencache.codec.eigen.codec import EigenCodec
from eigencache.codec.eigen.transform import JointTransform
from eigencache.codec.layout import Layout, Part, by_layer
from eigencache.fitting.eigen import Coefficients, EigenFit, EigenSettings
from eigencache.fitting.eigen_basis import basis_of, scaled_metrics


@dataclass(frozen=True, eq=False)
class Stage:
    """One layer: its columns, weights [before, width] that predict it from the layer before, and a codec of the residual."""

    columns: Tensor
    weights: Tensor | None
    codec: EigenCodec


@dataclass(frozen=True, eq=False)
class LayerPrediction:
    """A codec of stages in the order of layers, with one quantization step for all."""

    layout: Layout
    mean: Tensor
    stages: tuple[Stage, ...]
    name: str
    nbytes: int = 0

    def encode(self, cached: Cached, start: int) -> EncodedBytes:
        """Encode and decode a cache; return zero bytes of the ideal length for every row, and store the decoded cache."""
        x = self.layout.vectors(cached, start) - self.mean
        decoded, bits = torch.zeros_like(x), torch.zeros(len(x))
        before = None
        for stage in self.stages:
            expected = 0 if stage.weights is None else before @ stage.weights
            q = stage.codec.quantizer.quantize(
                stage.codec.transform.encode(x[..., stage.columns] - expected, stage.codec.step)
            )
            before = expected + stage.codec.transform.decode(stage.codec.quantizer.dequantize(q), stage.codec.step)
            decoded[..., stage.columns] = before
            bits += torch.tensor([stage.codec.tables.bits(row.T.numpy()) for row in q])
        self.__dict__["decoded"] = self.layout.slots(decoded + self.mean, start)
        return EncodedBytes(tuple(bytes(int(b / 8)) for b in bits), start, length_of(cached))

    def decode(self, encoded: EncodedBytes) -> dict[int, tuple[Tensor, Tensor]]:
        """Return the cache that `encode` decoded."""
        return by_layer(self.__dict__["decoded"], torch.float32)


def fit_layer_prediction(source: CalibrationSet, settings: EigenSettings, step: float) -> LayerPrediction:
    """Fit the stages in order, each on the layer before as decoded at this step.

    Args:
        source: Calibration data.
        settings: Settings of the codec of every stage.
        step: Quantization step.
    """
    layout, metrics = source.samples.layout, source.metric(settings.metric)
    mean = source.samples.vectors.mean(0)
    x, held = source.samples.vectors - mean, source.held.vectors - mean
    spans = layout.spans
    scaled = scaled_metrics(metrics, settings.alpha)
    stages: list[Stage] = []
    before = held_before = None
    for layer_idx in sorted({part.layer_idx for part in layout.parts}):
        chosen = [i for i, part in enumerate(layout.parts) if part.layer_idx == layer_idx]
        columns = torch.cat([torch.arange(*spans[i]) for i in chosen])
        blocks = [tuple(kind[i] for i in chosen) if kind else () for kind in scaled]
        weights = None if before is None else _ridge(before, x[:, columns])
        rest, held_rest = x[:, columns], held[:, columns]
        if weights is not None:
            rest, held_rest = rest - before @ weights, held_rest - held_before @ weights
        parts = tuple(Part(0, k, layout.parts[i].heads, layout.parts[i].dim) for k, i in enumerate(chosen))
        basis, values = basis_of(rest, 0, len(columns), blocks[1], blocks[2])
        transform = JointTransform(torch.zeros(len(columns)), (basis,), blocks[0])
        fit = EigenFit(
            settings,
            Layout(parts, {}),
            transform,
            values,
            None,
            0,
            Coefficients(transform.encode(rest, 1.0), None),
            Coefficients(transform.encode(held_rest, 1.0), None),
            source.held_out,
            torch.float32,
        )
        codec = fit.at_step(step).codec
        stages.append(Stage(columns, weights, codec))
        decoded = [_decoded(codec, part) for part in (rest, held_rest)]
        before, held_before = (
            a if weights is None else a + b @ weights for a, b in zip(decoded, (before, held_before), strict=True)
        )
    return LayerPrediction(layout, mean, tuple(stages), f"layer from layer {step:.3g}")


def _decoded(codec: EigenCodec, rest: Tensor) -> Tensor:
    q = codec.quantizer.quantize(codec.transform.encode(rest, codec.step))
    return codec.transform.decode(codec.quantizer.dequantize(q), codec.step)


def _ridge(before: Tensor, x: Tensor) -> Tensor:
    gram = before.mT.double() @ before.double()
    gram += 1e-4 * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    return torch.linalg.solve(gram, before.mT.double() @ x.double()).float()
