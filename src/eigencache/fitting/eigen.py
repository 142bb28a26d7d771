"""Fit `eigen`: sample vectors and metric once, then fit a codec for any quantization step.

Every stage is predicted from the stage before as it is decoded at that step, so the stages are fitted with the step. Sizes
and losses are measured on held-out sequences.
"""

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import NamedTuple, get_args

import torch
from torch import Tensor

from eigencache.calibration.calibration_set import CalibrationSet
from eigencache.calibration.metrics import FROBENIUS, check_metric
from eigencache.calibration.vectors import SampledVectors
from eigencache.codec.eigen.codec import EigenCodec, SinksAndWindow
from eigencache.codec.eigen.entropy_tables import fit_tables
from eigencache.codec.eigen.position_means import PositionMeans
from eigencache.codec.eigen.token_predictor import TokenPredictor
from eigencache.codec.eigen.transform import StagedTransform
from eigencache.codec.layout import Layout
from eigencache.codec.sinks_and_window import FIRST_EXACT
from eigencache.corpora.sequences import Sequences
from eigencache.errors import CodecError, StatisticsError
from eigencache.fitting.eigen_basis import EigenScope, scaled_metrics, spans_of, stored_inverses
from eigencache.fitting.eigen_stage import FittedStage, Halves, basis_of, fit_stage, joined
from eigencache.fitting.limits import check_at_least
from eigencache.fitting.position_means import fit_positions
from eigencache.fitting.token_predictor import fit_text, vocabulary
from eigencache.fitting.weighed_vectors import WeighedVectors, rows_after
from eigencache.memory import release
from eigencache.progress import Progress, silent
from eigencache.spectral.metric import inverted

_LANES, _WASTE = (32, 16, 8, 4), 0.005  # lanes of a coder; largest share of a block that their states of 2 bytes may take
_APART = 8  # one of eight calibration sequences fits the quantizer and the tables, and the basis does not see it
_PILOT = 8  # one of eight sequences is in the pilot
_ROWS = 1024  # vectors at a time


@dataclass(frozen=True)
class EigenSettings:
    """Settings of an `eigen` codec.

    Args:
        scope: what a stage covers: a head, a slot of a layer, a group of layers, or all layers (joint). Only groups of
            layers are predicted from the group before.
        metric: error metric.
        alpha: exponent of the metric.
        text: predict the first stage from the tokens.
        sinks: first positions that are not coded. None is 4, or more where the gradients of the Fisher metric show more
            attention sinks; always 4 in the metric `frobenius`, which measures no gradients.
        window: most recent tokens that are not coded.
        kept_bits: bits per value of sinks and window, 8 or 16.
        block: tokens that are decoded together.
        group: layers of a group.
        amortize: stored tokens that share the side information. A row is left out if it costs more bits than it saves
            over that number of tokens.

    Raises:
        CodecError: an unknown `scope` or `kept_bits`, or a number below its least value.
        StatisticsError: an unknown `metric`.
    """

    scope: EigenScope = "groups"
    metric: str = "fisher"
    alpha: float = 0.75
    text: bool = True
    sinks: int | None = None
    window: int = 0
    kept_bits: int = 16
    block: int = 128
    group: int = 3
    amortize: int = 1_000_000

    def __post_init__(self) -> None:
        check_metric(self.metric)
        for name, allowed in (("scope", get_args(EigenScope)), ("kept_bits", (8, 16))):
            if (value := getattr(self, name)) not in allowed:
                raise CodecError(f"`{name}` {value} does not exist. Use one of {', '.join(map(str, allowed))}.")
        check_at_least(self, group=1, amortize=1, block=1, window=0, sinks=0, alpha=0)

    def describe(self) -> str:
        """Return one line for tables."""
        metric = self.metric + (f"^{self.alpha:g}" if self.alpha != 1 and self.metric != "frobenius" else "")
        scope = f"groups of {self.group}" if self.scope == "groups" else self.scope
        return " · ".join(["eigen", scope, metric] + (["text"] if self.text else []))


class Point(NamedTuple):
    """A codec and what its entropy tables make of the held-out tokens."""

    codec: EigenCodec
    coded_bits: float  # mean of a token, without the states of the lanes
    escaped: float  # share of the integers that are beyond their table


@dataclass(frozen=True, eq=False)
class Source:
    """Vectors in the metric, with the ranks of their tokens [n] and what these predict for the first stage [n, columns]."""

    vectors: WeighedVectors
    ranks: Tensor | None = None
    first: Tensor | None = None

    def beginning(self, share: int) -> "Source":
        """Return one of `share` sequences, the first ones."""
        vectors = self.vectors.beginning(share)
        ranks, first = (x if x is None else x[: len(vectors)] for x in (self.ranks, self.first))
        return Source(vectors, ranks, first)


@dataclass(frozen=True, eq=False)
class EigenFit:
    """What the codecs of all steps share, and the vectors that they are fitted on.

    Args:
        settings: settings of the fit.
        layout: heads and layers of the vectors.
        inverse_roots: blocks of R⁻¹ as they are stored.
        text: predictor of the first stage from the tokens.
        positions: means by position, for models that do not rotate keys.
        sinks: first positions that are not coded.
        fitted: what bases and predictions are fitted on.
        apart: what the quantizer and the tables are fitted on.
        held: what the size is measured on.
        held_out: the sequences of `held`.
        dtype: dtype of the model.
        spread: root of the mean square of a number of z.
        sizes: bits of a coded held-out token by the steps that were fitted so far.
        on_progress: called with the stages done and their number, anew for every step.
    """

    settings: EigenSettings
    layout: Layout
    inverse_roots: tuple[Tensor, ...]
    text: TokenPredictor | None
    positions: PositionMeans | None
    sinks: int
    fitted: Source
    apart: Source
    held: Source
    held_out: Sequences
    dtype: torch.dtype
    spread: float
    sizes: dict[float, float] = field(default_factory=dict)
    on_progress: Progress = silent
    _bases: dict[int, Tensor] = field(default_factory=dict)  # of stages that nothing predicts, by first column

    @cached_property
    def pilot(self) -> "EigenFit | None":
        """The fit to an eighth of the vectors, whose sizes tell where to search; None where that is impossible."""
        sources = {name: getattr(self, name).beginning(_PILOT) for name in ("fitted", "apart", "held")}
        widest = max(stop - start for start, stop in spans_of(self.layout, self.settings.scope, self.settings.group))
        count = len(sources["fitted"].vectors)
        if count < 2 * widest or 2 * count > len(self.fitted.vectors):  # one long sequence cannot be divided
            return None
        return replace(self, **sources, sizes={}, _bases={})

    @torch.no_grad()
    def at_step(self, step: float, name: str | None = None) -> Point:
        """Fit the codec of one quantization step.

        Args:
            step: quantization step, in units of the scaled metric.
            name: name of the codec; by default its settings.

        Raises:
            StatisticsError: the step is so coarse that no coefficient is worth a bit.
        """
        stages = self._stages(step)
        quantizer, table_of, symbols = joined(stages)
        if not len(table_of):
            raise StatisticsError(
                f"{self.settings.describe()}: no coefficient is worth a bit at the step {step:g}. Use more `bits`."
            )
        symbols = self._with_digits(self.apart.ranks, symbols)
        digits = symbols.shape[1] - len(table_of)
        table_of = torch.cat([torch.arange(digits), table_of + digits])
        codec = EigenCodec(
            name=name or self.settings.describe(),
            layout=self.layout,
            transform=StagedTransform(self.fitted.vectors.mean, tuple(s.stage for s in stages), self.inverse_roots),
            step=step,
            quantizer=quantizer,
            tables=fit_tables(symbols.T.contiguous().numpy(), table_of.numpy()),
            lanes=_LANES[-1],
            kept=SinksAndWindow(self.sinks, self.settings.window, self.settings.kept_bits),  # type: ignore[arg-type]
            block=self.settings.block,
            dtype=self.dtype,
            text=self.text,
            positions=self.positions,
        )
        coded_bits, escaped = self._coded(codec)
        self.sizes[step] = coded_bits
        payload = coded_bits * self.settings.block / 8
        lanes = next((n for n in _LANES if 2 * n <= _WASTE * payload), _LANES[-1])
        release()
        return Point(replace(codec, lanes=lanes), coded_bits, escaped)

    def bits_per_value(self, point: Point, context: int) -> float:
        """Return the bits of a container of `context` tokens per cached value, as measured on the held-out sequences."""
        return 8 * point.codec.nbytes_of(context, point.coded_bits) / (context * self.layout.width)

    def _stages(self, step: float) -> list[FittedStage]:
        stages: list[FittedStage] = []
        chained = self.settings.scope == "groups"
        spans = spans_of(self.layout, self.settings.scope, self.settings.group)
        for index, (start, stop) in enumerate(spans):
            self.on_progress("fitting at one quantization step", index, len(spans))
            columns = Halves(*(source.vectors.columns(start, stop) for source in (self.fitted, self.apart)))
            told = None
            if not stages and self.fitted.first is not None and self.apart.first is not None:
                told = Halves(self.fitted.first, self.apart.first)
            before = stages[-1].decoded if stages and chained else None
            if before is None and start not in self._bases:
                self._bases[start] = basis_of(columns.fitted if told is None else columns.fitted - told.fitted)
            if stages:  # only the decoded columns of the last stage are needed
                stages[-1] = stages[-1]._replace(decoded=Halves(torch.empty(0), torch.empty(0)))
            known = self._bases[start] if before is None else None
            predicts = chained and stop < self.layout.width
            stages.append(fit_stage(start, columns, told, before, step, self.settings.amortize, known, decode=predicts))
        self.on_progress("fitting at one quantization step", len(spans), len(spans))
        return stages

    def _coded(self, codec: EigenCodec) -> tuple[float, float]:
        """Return the mean bits of the integers of a held-out token, and the share of them beyond their table."""
        bits, escapes, held = 0.0, 0, self.held
        for rows in torch.arange(len(held.vectors)).split(_ROWS):
            z = held.vectors.columns(0, self.layout.width, rows)
            first = None if held.first is None else held.first[rows]
            symbols = codec.transform.quantize(z, codec.step, codec.quantizer, first)
            ranks = None if held.ranks is None else held.ranks[rows]
            more = codec.tables.bits_and_escapes(self._with_digits(ranks, symbols).T.numpy())
            bits, escapes = bits + more[0], escapes + more[1]
        return bits / len(held.vectors), escapes / (len(held.vectors) * len(codec.tables.table_of))

    def _with_digits(self, ranks: Tensor | None, symbols: Tensor) -> Tensor:
        """Put the digits of the tokens, if they are coded, before the integers of their coefficients [n, r]."""
        if self.text is None or ranks is None:
            return symbols
        return torch.cat([self.text.digits.split(ranks), symbols], 1)


@torch.no_grad()
def fit_eigen(calibration: CalibrationSet, settings: EigenSettings = EigenSettings()) -> EigenFit:
    """Prepare the fit to a calibration set: the metric, the sinks, and the predictors from tokens and positions.

    Raises:
        StatisticsError: too little text, or no sequence is longer than the sinks.
    """
    session = calibration.session
    metrics = calibration.metric(settings.metric)  # before the vectors are sampled, so that memory holds one or the other
    samples, held = calibration.samples, calibration.held_out_samples
    roots, inverses = scaled_metrics(metrics, settings.alpha, samples.live)
    session.on_progress("preparing the fit", 0, 1)
    positions = None
    if not samples.layout.rotations:
        positions = fit_positions(samples, roots, inverses)
        samples, held = samples.less_positions(positions), held.less_positions(positions)
    inverses = stored_inverses(inverses)
    roots = inverted(inverses)
    sinks = settings.sinks
    if sinks is None:
        sinks = FIRST_EXACT if settings.metric == FROBENIUS else calibration.sinks
    edge = len(samples.lengths) - max(1, len(samples.lengths) // _APART)
    parts = samples.sequences(0, edge), samples.sequences(edge, len(samples.lengths)), held
    mean = mean_of(parts[0], sinks)
    fitted, apart, held_vectors = (WeighedVectors(part, sinks, mean, roots) for part in parts)
    text, sources = None, [Source(vectors) for vectors in (fitted, apart, held_vectors)]
    if settings.text:
        rank_of, features = vocabulary(session.loaded, fitted.ids)
        unwindowed = [layer.layer_idx for layer in session.loaded.geometry.layers if layer.attention == "full"]
        stop = spans_of(samples.layout, settings.scope, settings.group)[0][1]
        text = fit_text(fitted, rank_of, features, stop, told_by=unwindowed[0] if unwindowed else None)
        ranks = [vectors.ranks(text) for vectors in (fitted, apart, held_vectors)]
        sources = [
            Source(s.vectors, r, s.vectors.predicted(text, r, settings.block)) for s, r in zip(sources, ranks, strict=True)
        ]
    session.on_progress("preparing the fit", 1, 1)
    return EigenFit(
        settings=settings,
        layout=samples.layout,
        inverse_roots=inverses,
        text=text,
        positions=positions,
        sinks=sinks,
        fitted=sources[0],
        apart=sources[1],
        held=sources[2],
        held_out=calibration.held_out,
        dtype=session.loaded.model.dtype,
        spread=_spread(fitted),
        on_progress=session.on_progress,
    )


def mean_of(samples: SampledVectors, first: int) -> Tensor:
    """Return the mean vector [width] in float32 of all but the `first` tokens of every sequence."""
    rows = rows_after(samples, first)
    total = sum(samples.vectors(part).sum(0, dtype=torch.float64) for part in rows.split(_ROWS))
    return (total / len(rows)).float()  # type: ignore[union-attr]


def _spread(vectors: WeighedVectors) -> float:
    parts = torch.arange(len(vectors)).split(_ROWS)
    total = sum(float(vectors.columns(0, vectors.width, rows).square().sum(dtype=torch.float64)) for rows in parts)
    return (total / (len(vectors) * vectors.width)) ** 0.5
