"""Fit `eigen`: sample vectors, metric and transform once, then make a codec for any quantization step.

Quantizer and entropy tables depend on the step and are fitted with it. Sizes and losses are measured on held-out
sequences.
"""

from dataclasses import dataclass, replace
from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor

from eigencache.calibration.calibration_set import CalibrationSet
from eigencache.calibration.metrics import check_metric
from eigencache.calibration.vectors import SampledVectors
from eigencache.codec.eigen.codec import EigenCodec, SinksAndWindow
from eigencache.codec.eigen.entropy_tables import fit_tables
from eigencache.codec.eigen.position_means import PositionMeans
from eigencache.codec.eigen.quantizer import DeadZone, fit_class
from eigencache.codec.eigen.token_predictor import TokenPredictor
from eigencache.codec.eigen.transform import JointTransform
from eigencache.codec.layout import Layout
from eigencache.codec.sinks_and_window import FIRST_EXACT
from eigencache.corpora.sequences import Sequences
from eigencache.errors import CodecError, StatisticsError
from eigencache.fitting.eigen_basis import JointScope, basis_of, scaled_metrics, spans_of
from eigencache.fitting.position_means import fit_positions
from eigencache.fitting.token_predictor import fit_text, vocabulary
from eigencache.spectral.metric import block_product

FITTED = 16_384  # vectors that the quantizer and the tables of a step are fitted on
_PER_OCTAVE = 4  # classes of coefficients per octave of their deviation
_NARROWEST = -4  # octaves below the step; all narrower coefficients share one class
_LANES, _WASTE = (32, 16, 8, 4), 0.005  # lanes of a coder; largest share of a block that their states of 2 bytes may take
_SINK, _FIRST = 4.0, 16  # a sink costs more than 4 times the median position; only the first 16 positions are tested


@dataclass(frozen=True)
class EigenSettings:
    """Settings of an `eigen` codec.

    Args:
        scope: vectors that share a basis: each head, a layer, all layers of a kind, or all.
        metric: error metric.
        alpha: exponent of the metric.
        text: predict the vectors from the tokens.
        sinks: first positions that are not coded. None is 4, or more where more positions cost 4 times the median.
        window: most recent tokens that are not coded.
        kept_bits: bits per value of sinks and window, 8 or 16.
        block: tokens that are decoded together.
    """

    scope: JointScope = "joint"
    metric: str = "fisher"
    alpha: float = 0.75
    text: bool = True
    sinks: int | None = None
    window: int = 0
    kept_bits: int = 16
    block: int = 128

    def describe(self) -> str:
        """Return one line for tables."""
        metric = self.metric + (f"^{self.alpha:g}" if self.alpha != 1 and self.metric != "frobenius" else "")
        return " · ".join(["eigen", self.scope, metric] + (["text"] if self.text else []))


def settings_of(**chosen: Any) -> EigenSettings:
    """Return settings from the values that a user chose.

    Raises:
        CodecError: an unknown `scope` or `kept_bits`.
        StatisticsError: an unknown `metric`.
    """
    if "metric" in chosen:
        check_metric(chosen["metric"])
    for name, allowed in (("scope", get_args(JointScope)), ("kept_bits", (8, 16))):
        if name in chosen and chosen[name] not in allowed:
            raise CodecError(f"`{name}` {chosen[name]} does not exist. Use one of {', '.join(map(str, allowed))}.")
    return EigenSettings(**chosen)


@dataclass(frozen=True, eq=False)
class Coefficients:
    """Coefficients y [n, r] of sampled tokens at step 1, and the ranks of the tokens [n] if text predicts."""

    y: Tensor
    ranks: Tensor | None


class Point(NamedTuple):
    """A codec, and the mean bits of a coded held-out token under its entropy tables, without the states of the lanes."""

    codec: EigenCodec
    coded_bits: float


@dataclass(frozen=True, eq=False)
class EigenFit:
    """A fitted transform, and the coefficients of the vectors it was fitted on and of held-out vectors.

    Args:
        settings: settings of the fit.
        layout: heads and layers of the vectors.
        transform: the transform of full rank.
        eigenvalues: variances of all coefficients in the metric [r].
        text: predictor of the vectors from the tokens.
        positions: means by position, for models that do not rotate keys.
        sinks: first positions that are not coded.
        fitted: coefficients that the transform was fitted on.
        held_out_coefficients: coefficients of the held-out sequences.
        held_out: the held-out sequences.
        dtype: dtype of the model.
    """

    settings: EigenSettings
    layout: Layout
    transform: JointTransform
    eigenvalues: Tensor
    text: TokenPredictor | None
    positions: PositionMeans | None
    sinks: int
    fitted: Coefficients
    held_out_coefficients: Coefficients
    held_out: Sequences
    dtype: torch.dtype

    def at_step(self, step: float, name: str | None = None) -> Point:
        """Fit quantizer and entropy tables of one quantization step.

        Args:
            step: quantization step, in units of the scaled metric.
            name: name of the codec; by default its settings.

        Raises:
            StatisticsError: the step is so coarse that no coefficient is worth a bit.
        """
        fitted = _every(self.fitted, FITTED)
        y = fitted.y / step
        octaves = (y.square().mean(0).sqrt() + 1e-12).log2().clamp_min(_NARROWEST)
        classes, class_of = (octaves * _PER_OCTAVE).round().unique(return_inverse=True)
        fits = [fit_class(y[:, class_of == c].abs().flatten().numpy()) for c in range(len(classes))]
        kept = torch.tensor([fit.worth for fit in fits])[class_of].nonzero().flatten()
        if not len(kept):
            raise StatisticsError(
                f"{self.settings.describe()}: no coefficient is worth a bit at the step {step:g}. Use more `bits`."
            )
        numbers = torch.tensor([(f.dead_zone, f.offset, f.first, f.rest) for f in fits], dtype=torch.float32)
        quantizer = DeadZone(*numbers[class_of[kept]].T.contiguous())
        table_of = class_of[kept].unique(return_inverse=True)[1]
        symbols = quantizer.quantize(y[:, kept])
        if self.text is not None and fitted.ranks is not None:
            count = self.text.digits.count
            symbols = torch.cat([self.text.digits.split(fitted.ranks), symbols], 1)
            table_of = torch.cat([torch.arange(count), table_of + count])
        tables = fit_tables(symbols.T.contiguous().numpy(), table_of.numpy())
        codec = EigenCodec(
            name=name or self.settings.describe(),
            layout=self.layout,
            transform=_restricted(self.transform, kept),
            step=step,
            quantizer=quantizer,
            tables=tables,
            lanes=_LANES[-1],
            kept=SinksAndWindow(self.sinks, self.settings.window, self.settings.kept_bits),  # type: ignore[arg-type]
            block=self.settings.block,
            dtype=self.dtype,
            text=self.text,
            positions=self.positions,
        )
        held_out = _every(self.held_out_coefficients, FITTED)
        symbols = quantizer.quantize(held_out.y[:, kept] / step)
        if self.text is not None and held_out.ranks is not None:
            symbols = torch.cat([self.text.digits.split(held_out.ranks), symbols], 1)
        coded_bits = tables.bits(symbols.T.numpy()) / len(symbols)
        payload = coded_bits * self.settings.block / 8
        lanes = next((n for n in _LANES if 2 * n <= _WASTE * payload), _LANES[-1])
        return Point(replace(codec, lanes=lanes), coded_bits)

    def bits_per_value(self, point: Point, context: int) -> float:
        """Return the bits of a container of `context` tokens per cached value, as measured on the held-out sequences."""
        return 8 * point.codec.nbytes_of(context, point.coded_bits) / (context * self.layout.width)


@torch.no_grad()
def fit_eigen(calibration: CalibrationSet, settings: EigenSettings = EigenSettings()) -> EigenFit:
    """Fit the transform, and the predictors from tokens and positions, to a calibration set.

    Raises:
        StatisticsError: too little text, or no sequence is longer than the sinks.
    """
    session = calibration.session
    samples, held_out = calibration.samples, calibration.held_out_samples
    session.on_progress("decomposing", 0, 1)
    full, roots, inverses = scaled_metrics(calibration.metric(settings.metric), settings.alpha)
    mean, positions = samples.mean, None
    if not samples.layout.rotations:
        positions = fit_positions(samples.less_mean(mean), roots, inverses)
        samples, held_out = samples.less_positions(positions), held_out.less_positions(positions)
        mean = samples.mean
    sinks = settings.sinks
    if sinks is None:
        sinks = max(FIRST_EXACT, outstanding(samples.less_mean(mean), roots))
    samples, held_out = samples.without_first(sinks), held_out.without_first(sinks)
    mean = samples.mean
    samples, held_out = samples.less_mean(mean), held_out.less_mean(mean)
    text, ranks = None, (None, None)
    if settings.text:
        rank_of, features = vocabulary(session.loaded, samples.ids)
        unwindowed = [layer.layer_idx for layer in session.loaded.geometry.layers if layer.attention == "full"]
        told_by = unwindowed[0] if unwindowed else None
        text = fit_text(samples, rank_of[samples.ids], features, roots, inverses, told_by=told_by)
        samples, fitted_ranks = _unpredicted(samples, text, settings.block)
        held_out, held_out_ranks = _unpredicted(held_out, text, settings.block)
        ranks = (fitted_ranks, held_out_ranks)
    spans = spans_of(samples.layout, settings.scope)
    decomposed = [basis_of(samples.vectors, *span, roots, inverses) for span in spans]
    transform = JointTransform(mean, tuple(basis for basis, _ in decomposed), full)
    session.on_progress("decomposing", 1, 1)
    return EigenFit(
        settings=settings,
        layout=samples.layout,
        transform=transform,
        eigenvalues=torch.cat([values for _, values in decomposed]),
        text=text,
        positions=positions,
        sinks=sinks,
        fitted=Coefficients(transform.encode(samples.vectors, 1.0), ranks[0]),
        held_out_coefficients=Coefficients(transform.encode(held_out.vectors, 1.0), ranks[1]),
        held_out=calibration.held_out,
        dtype=session.loaded.model.dtype,
    )


def outstanding(samples: SampledVectors, roots: tuple[Tensor, ...]) -> int:
    """Return the number of first positions whose mean cost exceeds 4 times the median; only the first 16 are tested.

    Args:
        samples: centered vectors.
        roots: blocks of M^{α/2} [heads, dim, dim] per part. The cost of a vector is its squared norm in this metric.
    """
    costs = torch.cat([block_product(x, roots).double().square().sum(1) for x in samples.vectors.split(8192)])
    positions = samples.positions
    mean = torch.zeros(int(positions.max()) + 1, dtype=torch.float64).scatter_reduce(
        0, positions, costs, "mean", include_self=False
    )
    first = (mean[:_FIRST] > _SINK * mean.median()).tolist()
    return first.index(False) if False in first else _FIRST


def _unpredicted(samples: SampledVectors, text: TokenPredictor, block: int) -> tuple[SampledVectors, Tensor]:
    """Subtract the prediction from the tokens, and return the ranks of the tokens as encoding finds them [n]."""
    vectors, ranks = samples.vectors.clone(), []
    for part in vectors.split(list(samples.lengths)):
        ranks.append(text.find(part[None]))
        part.sub_(text.predict(ranks[-1], block)[0])
    return replace(samples, vectors=vectors), torch.cat(ranks, 1)[0]


def _every(coefficients: Coefficients, count: int) -> Coefficients:
    """Return about `count` coefficients, evenly spaced over the text."""
    step = max(1, len(coefficients.y) // count)
    return Coefficients(coefficients.y[::step], None if coefficients.ranks is None else coefficients.ranks[::step])


def _restricted(transform: JointTransform, kept: Tensor) -> JointTransform:
    """Return the transform with the coefficients `kept`, indices in ascending order."""
    bases, start = [], 0
    for basis in transform.bases:
        rows = kept[(kept >= start) & (kept < start + len(basis.rows))] - start
        start += len(basis.rows)
        bases.append(replace(basis, rows=basis.rows[rows], scale=basis.scale[rows]))
    return JointTransform(transform.mean, tuple(bases), transform.metrics)
