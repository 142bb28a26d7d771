"""Quality against rank and bytes: direct PCA of every target at every rank, scored through the cache in one pass.

The text is captured once and all codecs are fitted from the same moments; every batch of the held-out text is read by
all codecs beside the uncompressed cache, so that differences are paired. Results are kept batch by batch.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from eigencache.calibration.session import Session
from eigencache.codec.pca import CoefficientBits, PCACodec
from eigencache.corpora.overlap import check_overlap
from eigencache.corpora.sequences import Sequences
from eigencache.errors import StatisticsError
from eigencache.evaluate.codec_scoring import CodecScores, score_codecs
from eigencache.fitting.pca import PCACalibration, PCASettings, check_target, targets_of, width_of
from eigencache.models.load import LoadedModel
from eigencache.records.base import SCOPES, Scope
from eigencache.records.provenance import Stopwatch
from eigencache.records.quality import ReadingProtocol, SweepPoint, SweepRecord, SweepSeries

Ranks = tuple[int | None, ...] | None
TENTHS = tuple(tenth / 10 for tenth in range(1, 11))


@dataclass(frozen=True)
class Plan:
    """One series: what to compress, and the ranks; shares of the full width stand for ranks where `ranks` is None."""

    settings: PCASettings
    bits: CoefficientBits = 16
    ranks: Ranks = None  # None among them: full
    shares: tuple[float, ...] = TENTHS

    def ranks_for(self, width: int) -> list[int]:
        """Ascending ranks. Raises `StatisticsError` for one that does not exist."""
        wanted = [round(share * width) for share in self.shares] if self.ranks is None else [r or width for r in self.ranks]
        if bad := [rank for rank in wanted if rank > width]:
            raise StatisticsError(
                f"`ranks` {bad[0]}: {self.settings.describe()} has ranks 1 to {width}; use a lower one, or full"
            )
        return sorted({max(1, rank) for rank in wanted})


def default_plans(
    loaded: LoadedModel, settings: PCASettings, *, bits: CoefficientBits = 16, ranks: Ranks = None
) -> list[Plan]:
    """Every target of the model in the wanted way, and keys in the way that gave them their bad name."""
    plans = [Plan(settings.of(target), bits, ranks) for target in targets_of(loaded)]
    if loaded.geometry.rope is not None and not loaded.geometry.mla:
        plans.append(Plan(PCASettings("k", settings.scope, "post", centered=False), bits, ranks))
    return plans


def control_plans(loaded: LoadedModel, *, bits: CoefficientBits = 16, ranks: Ranks = None) -> list[Plan]:
    """The first target per head: its own basis, one for all heads of a layer, and a random one."""
    target = targets_of(loaded)[0]
    return [Plan(PCASettings(target, "head", basis=basis), bits, ranks) for basis in ("fitted", "pooled", "random")]


def needed_scopes(plans: Sequence[Plan]) -> tuple[Scope, ...]:
    """The scopes whose moments have to be captured."""
    return tuple(scope for scope in SCOPES if any(plan.settings.scope == scope for plan in plans))


def check_plans(loaded: LoadedModel, plans: Sequence[Plan]) -> None:
    """Raises `CodecError` for a target and `StatisticsError` for a rank that the model cannot have: nothing is read yet."""
    for plan in plans:
        check_target(loaded, plan.settings.target)
        plan.ranks_for(width_of(loaded.geometry, plan.settings))


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
    """Score every plan at every rank on held-out `sequences`; `partial`: where results are kept while it runs.

    Raises `CorpusError` for an evaluation text that overlaps the calibration text (unless `force`), `StatisticsError`
    for ranks that do not exist and text that cannot carry a basis.
    """
    watch = Stopwatch()
    overlap = check_overlap(sequences.ids, calibration.sequences.ids, force=force)
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
        warnings=[*sequences.corpus.warnings, *calibration.sequences.corpus.warnings, *([overlap] if overlap else [])],
    )


def codecs_of(calibration: PCACalibration, plan: Plan) -> dict[str, PCACodec]:
    """The plan's codecs by name."""
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
