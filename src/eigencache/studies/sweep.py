"""Measure loss against rank and bytes: PCA of every target at every rank, with a compressed cache, in one pass.

The calibration text is captured once, and all codecs are fitted from the same moments. All codecs and the uncompressed
cache read every batch of the held-out text, so that differences are paired. Results are saved after every batch.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, get_args, get_origin, get_type_hints

from eigencache.calibration.metrics import check_metric
from eigencache.calibration.session import Session
from eigencache.codec.pca import CoefficientBits, PCACodec
from eigencache.corpora.overlap import check_overlap
from eigencache.corpora.sequences import Sequences
from eigencache.errors import CodecError, StatisticsError
from eigencache.evaluate.codec_scoring import CodecScores, score_codecs
from eigencache.evaluate.likelihood import scored_batches
from eigencache.fitting.pca import PCACalibration
from eigencache.fitting.pca_settings import PCASettings, check_target, targets_of, width_of
from eigencache.models.load import LoadedModel
from eigencache.records.base import SCOPES, Scope
from eigencache.records.provenance import Stopwatch
from eigencache.records.quality import ReadingProtocol, SweepPoint, SweepRecord, SweepSeries

Ranks = tuple[int | None, ...] | None
TENTHS = tuple(tenth / 10 for tenth in range(1, 11))
_CHOICES = {name: get_args(of) for name, of in get_type_hints(PCASettings).items() if get_origin(of) is Literal}


@dataclass(frozen=True)
class Plan:
    """Settings and ranks of one series of measurements.

    Args:
        settings: What to compress, and how its basis is fitted.
        bits: Bits per coefficient.
        ranks: Ranks; None as an element is full rank. Default: `shares`.
        shares: Ranks as fractions of the full width, if `ranks` is None.
    """

    settings: PCASettings
    bits: CoefficientBits = 16
    ranks: Ranks = None
    shares: tuple[float, ...] = TENTHS

    def ranks_for(self, width: int) -> list[int]:
        """Return the ranks in ascending order. Raises `StatisticsError` for a rank outside 1 to `width`, and for none."""
        if self.ranks is None:
            return sorted({max(1, round(share * width)) for share in self.shares})
        if not self.ranks:
            raise StatisticsError("`ranks` is empty. Give at least one rank, or omit it.")
        ranks = [width if rank is None else rank for rank in self.ranks]
        if bad := [rank for rank in ranks if not 1 <= rank <= width]:
            raise StatisticsError(
                f"`ranks` {bad[0]}: {self.settings.describe()} has ranks 1 to {width}. Use one of these, or full "
                "(in Python: None)."
            )
        return sorted(set(ranks))


def default_plans(
    loaded: LoadedModel, settings: PCASettings, *, bits: CoefficientBits = 16, ranks: Ranks = None
) -> list[Plan]:
    """Return a plan for every target of a model, and one for keys after RoPE about zero, the worst case.

    Args:
        loaded: The model.
        settings: PCA settings; the target is replaced.
        bits: Bits per coefficient.
        ranks: Ranks. Default: tenths of the full width.
    """
    plans = [Plan(settings.of(target), bits, ranks) for target in targets_of(loaded)]
    if loaded.geometry.rope is not None and not loaded.geometry.mla:
        plans.append(Plan(PCASettings("k", settings.scope, "post", centered=False), bits, ranks))
    return plans


def control_plans(loaded: LoadedModel, *, bits: CoefficientBits = 16, ranks: Ranks = None) -> list[Plan]:
    """Return plans of the first target per head with a fitted basis, one pooled over a layer, and a random one.

    Args:
        loaded: The model.
        bits: Bits per coefficient.
        ranks: Ranks. Default: tenths of the full width.
    """
    target = targets_of(loaded)[0]
    return [Plan(PCASettings(target, "head", basis=basis), bits, ranks) for basis in ("fitted", "pooled", "random")]


def needed_scopes(plans: Sequence[Plan]) -> tuple[Scope, ...]:
    """Return the scopes whose moments the plans need."""
    return tuple(scope for scope in SCOPES if any(plan.settings.scope == scope for plan in plans))


def check_plans(loaded: LoadedModel, plans: Sequence[Plan]) -> None:
    """Check plans before any text is read.

    Raises:
        CodecError: A setting has a value that does not exist, or the model does not have a target.
        StatisticsError: A rank is outside 1 to the width of its target, or no metric has the name.
    """
    for plan in plans:
        _check_choices(plan)
        check_metric(plan.settings.metric)
        check_target(loaded, plan.settings.target)
        plan.ranks_for(width_of(loaded.geometry, plan.settings))


def _check_choices(plan: Plan) -> None:
    """Raise `CodecError` for the first setting whose value is none of its type's."""
    values = {name: getattr(plan.settings, name) for name in _CHOICES} | {"bits": plan.bits}
    choices = _CHOICES | {"bits": get_args(CoefficientBits)}
    for name, value in values.items():
        if value not in choices[name]:
            raise CodecError(f"`{name}` {value!r} does not exist. Use one of {', '.join(map(str, choices[name]))}.")


@dataclass(frozen=True)
class _Series:
    plan: Plan
    codecs: dict[int, PCACodec]  # by rank
    width: int
    values_per_token: int  # of the target


def sweep_model(
    session: Session,
    sequences: Sequences,
    calibration: PCACalibration,
    plans: Sequence[Plan],
    protocol: ReadingProtocol,
    *,
    force: bool = False,
    partial: Path | None = None,
) -> SweepRecord:
    """Score every plan at every rank on held-out text.

    Args:
        session: Model and settings to run it with.
        sequences: Held-out text.
        calibration: Calibration that fits the bases.
        plans: Settings and ranks to measure.
        protocol: Reading protocol.
        force: Accept held-out text that overlaps the calibration text.
        partial: File that keeps finished batches, to resume from. Default: none.

    Raises:
        CorpusError: The held-out text overlaps the calibration text and `force` is false, or its sequences are too short.
        ModelError: The model has fewer positions than a sequence has tokens.
        StatisticsError: A rank does not exist, the calibration set is too small for a basis, or scoring needs more memory
            than the session allows.
    """
    watch = Stopwatch()
    overlap = check_overlap(sequences.ids, calibration.sequences.ids, force=force)
    scored_batches(session, sequences, protocol)  # raises before the fit if the text cannot be scored
    series = [_fit(calibration, plan) for plan in plans]
    scores = score_codecs(
        session,
        sequences,
        {codec.name: codec for s in series for codec in s.codecs.values()},
        protocol,
        calibration=calibration.sequences.corpus,
        partial=partial,
    )
    return SweepRecord(
        model=session.loaded.record("the cache itself"),
        corpus=sequences.corpus,
        calibration=calibration.sequences.corpus,
        protocol=protocol,
        run=watch.run(calibration.session.seed, {"batch_size": session.batch_size, "forced": force}),
        uncompressed_nll=scores.uncompressed_nll,
        series=[_series_record(session.loaded, s, scores) for s in series],
        warnings=[
            *sequences.corpus.warnings,
            *calibration.sequences.corpus.warnings,
            *([overlap] if overlap else []),
            *calibration.notes,
        ],
    )


def codecs_of(calibration: PCACalibration, plan: Plan) -> dict[str, PCACodec]:
    """Return the codecs of a plan by name."""
    return {codec.name: codec for codec in _fit(calibration, plan).codecs.values()}


def _fit(calibration: PCACalibration, plan: Plan) -> _Series:
    full = calibration.fit(plan.settings)
    width = max(group.transform.rank for group in full.groups)
    name = full.name if plan.bits == 16 else f"{full.name} · {plan.bits} bit"
    codecs = {rank: full.truncated(rank, f"{name} · rank {rank}", plan.bits) for rank in plan.ranks_for(width)}
    return _Series(plan, codecs, width, sum(group.transform.width for group in full.groups))


def _series_record(loaded: LoadedModel, series: _Series, scores: CodecScores) -> SweepSeries:
    points = []
    for rank, codec in series.codecs.items():
        quality = scores.quality[codec.name]
        rest = 2 * quality.encoded_tokens * (loaded.geometry.values_per_token - series.values_per_token)
        ratio = 2 * quality.encoded_tokens * series.values_per_token / (quality.encoded_nbytes - rest)
        points.append(SweepPoint(rank=rank, target_ratio=ratio, quality=quality))
    name = next(iter(series.codecs.values())).name.rsplit(" · ", 1)[0]
    return SweepSeries(name=name, **asdict(series.plan.settings), bits=series.plan.bits, width=series.width, points=points)
