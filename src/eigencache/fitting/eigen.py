"""Fitting `eigen`: samples, metric and transform once, then a codec for any step.

Quantizer and entropy tables belong to a step and are fitted with it. Some sequences are kept apart: on them, which
nothing was fitted on, size and loss are measured.
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

FITTED = 16_384  # vectors that quantizer and tables of a step are fitted on
_PER_OCTAVE = 4  # classes of coefficients
_NARROWEST = -4  # octaves of the step, below which coefficients are of one class
_LANES, _WASTE = (32, 16, 8, 4), 0.005  # a lane's state wastes 2 bytes of a block
_SINK, _FIRST = 4.0, 16  # a position stands out at so many times the median cost, among the first so many


@dataclass(frozen=True)
class EigenSettings:
    """What of a codec is chosen, not measured. `sinks` None: four first positions, or more where more stand out."""

    scope: JointScope = "joint"
    metric: str = "fisher"
    alpha: float = 0.75
    text: bool = True  # predict from the tokens
    sinks: int | None = None
    window: int = 0
    kept_bits: int = 16
    block: int = 128

    def describe(self) -> str:
        """One line for tables."""
        metric = self.metric + (f"^{self.alpha:g}" if self.alpha != 1 and self.metric != "frobenius" else "")
        return " · ".join(["eigen", self.scope, metric] + (["text"] if self.text else []))


def settings_of(**chosen: Any) -> EigenSettings:
    """Settings from names and numbers that a user gave. Raises `CodecError` for those that do not exist."""
    if "metric" in chosen:
        check_metric(chosen["metric"])
    for name, allowed in (("scope", get_args(JointScope)), ("kept_bits", (8, 16))):
        if name in chosen and chosen[name] not in allowed:
            raise CodecError(f"{name.replace('_', ' ')} {chosen[name]}: choose one of {', '.join(map(str, allowed))}")
    return EigenSettings(**chosen)


@dataclass(frozen=True, eq=False)
class Coefficients:
    """Of sampled tokens: y [n, r] at step 1, and the ranks of the tokens [n] where text predicts."""

    y: Tensor
    ranks: Tensor | None


class Point(NamedTuple):
    """A codec, and what a coded token costs of the sequences kept apart, by its tables, states of lanes left out."""

    codec: EigenCodec
    coded_bits: float


@dataclass(frozen=True, eq=False)
class EigenFit:
    """A fitted transform, and the coefficients it gives: of what it was fitted on, and of what was kept `apart`."""

    settings: EigenSettings
    layout: Layout
    transform: JointTransform
    eigenvalues: Tensor  # of all coefficients, in the metric [r]
    text: TokenPredictor | None
    positions: PositionMeans | None
    sinks: int
    fitted: Coefficients
    held: Coefficients
    held_out: Sequences
    dtype: torch.dtype

    def at_step(self, step: float, name: str | None = None) -> Point:
        """The codec of one step, with its quantizer and tables. Raises `StatisticsError` where nothing is worth a bit."""
        fitted = _every(self.fitted, FITTED)
        y = fitted.y / step
        octaves = (y.square().mean(0).sqrt() + 1e-12).log2().clamp_min(_NARROWEST)
        classes, class_of = (octaves * _PER_OCTAVE).round().unique(return_inverse=True)
        fits = [fit_class(y[:, class_of == c].abs().flatten().numpy()) for c in range(len(classes))]
        kept = torch.tensor([fit.worth for fit in fits])[class_of].nonzero().flatten()
        if not len(kept):
            raise StatisticsError(
                f"{self.settings.describe()}: at this size no coefficient is worth a bit: ask for more bits"
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
        held = _every(self.held, FITTED)
        found = quantizer.quantize(held.y[:, kept] / step)
        if self.text is not None and held.ranks is not None:
            found = torch.cat([self.text.digits.split(held.ranks), found], 1)
        coded_bits = tables.bits(found.T.numpy()) / len(found)
        payload = coded_bits * self.settings.block / 8
        lanes = next((n for n in _LANES if 2 * n <= _WASTE * payload), _LANES[-1])
        return Point(replace(codec, lanes=lanes), coded_bits)

    def bits_per_value(self, point: Point, context: int) -> float:
        """All bytes of a container of `context` tokens over what it holds, as measured on the sequences kept apart."""
        return 8 * point.codec.nbytes_of(context, point.coded_bits) / (context * self.layout.width)


@torch.no_grad()
def fit_eigen(calibration: CalibrationSet, settings: EigenSettings = EigenSettings()) -> EigenFit:
    """Decompose the vectors of a calibration set in the metric of `settings`.

    Raises `StatisticsError` for too little text, and the errors of capturing.
    """
    session = calibration.session
    samples, held = calibration.samples, calibration.held_out_samples
    session.on_progress("decomposing", 0, 1)
    full, roots, inverses = scaled_metrics(calibration.metric(settings.metric), settings.alpha)
    mean, positions = samples.mean, None
    if not samples.layout.rotations:
        positions = fit_positions(samples.less_mean(mean), roots, inverses)
        samples, held = samples.less_positions(positions), held.less_positions(positions)
        mean = samples.mean
    sinks = settings.sinks
    if sinks is None:
        sinks = max(FIRST_EXACT, outstanding(samples.less_mean(mean), roots))
    samples, held = samples.without_first(sinks), held.without_first(sinks)
    mean = samples.mean
    samples, held = samples.less_mean(mean), held.less_mean(mean)
    text, ranks = None, (None, None)
    if settings.text:
        rank_of, features = vocabulary(session.loaded, samples.ids)
        whole = [layer.layer_idx for layer in session.loaded.geometry.layers if layer.attention == "full"]  # no window
        told_by = whole[0] if whole else None
        text = fit_text(samples, rank_of[samples.ids], features, roots, inverses, told_by=told_by)
        (samples, found), (held, found_apart) = (_unpredicted(part, text, settings.block) for part in (samples, held))
        ranks = (found, found_apart)
    spans = spans_of(samples.layout, settings.scope)
    found = [basis_of(samples.vectors, *span, roots, inverses) for span in spans]
    transform = JointTransform(mean, tuple(basis for basis, _ in found), full)
    session.on_progress("decomposing", 1, 1)
    return EigenFit(
        settings=settings,
        layout=samples.layout,
        transform=transform,
        eigenvalues=torch.cat([values for _, values in found]),
        text=text,
        positions=positions,
        sinks=sinks,
        fitted=Coefficients(transform.encode(samples.vectors, 1.0), ranks[0]),
        held=Coefficients(transform.encode(held.vectors, 1.0), ranks[1]),
        held_out=calibration.held_out,
        dtype=session.loaded.model.dtype,
    )


def outstanding(samples: SampledVectors, roots: tuple[Tensor, ...]) -> int:
    """How many first positions stand out: the mean cost of a position's vectors is more than 4 times the median one."""
    costs = torch.cat([block_product(x, roots).double().square().sum(1) for x in samples.vectors.split(8192)])
    positions = samples.positions
    mean = torch.zeros(int(positions.max()) + 1, dtype=torch.float64).scatter_reduce(
        0, positions, costs, "mean", include_self=False
    )
    first = (mean[:_FIRST] > _SINK * mean.median()).tolist()
    return first.index(False) if False in first else _FIRST


def _unpredicted(samples: SampledVectors, text: TokenPredictor, block: int) -> tuple[SampledVectors, Tensor]:
    """What the text does not predict, and the ranks that were found, as encoding finds them."""
    vectors, ranks = samples.vectors.clone(), []
    for part in vectors.split(list(samples.lengths)):
        ranks.append(text.find(part[None]))
        part.sub_(text.predict(ranks[-1], block)[0])
    return replace(samples, vectors=vectors), torch.cat(ranks, 1)[0]


def _every(coefficients: Coefficients, count: int) -> Coefficients:
    """About `count` of them, from all over the text."""
    step = max(1, len(coefficients.y) // count)
    return Coefficients(coefficients.y[::step], None if coefficients.ranks is None else coefficients.ranks[::step])


def _restricted(transform: JointTransform, kept: Tensor) -> JointTransform:
    """The transform with some of its coefficients [r] only."""
    bases, at = [], 0
    for basis in transform.bases:
        rows = kept[(kept >= at) & (kept < at + len(basis.rows))] - at
        at += len(basis.rows)
        bases.append(replace(basis, rows=basis.rows[rows], scale=basis.scale[rows]))
    return JointTransform(transform.mean, tuple(bases), transform.metrics)
