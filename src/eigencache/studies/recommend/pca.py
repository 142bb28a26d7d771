"""Search PCA settings: a coarse pass over all of them, a fine pass near the budget, and a pass that states the loss."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from eigencache.calibration.session import Session
from eigencache.codec.pca import CoefficientBits
from eigencache.corpora.sequences import Sequences
from eigencache.evaluate.likelihood import scored_batches
from eigencache.fitting.pca import PCACalibration
from eigencache.records.advice import Budget, Candidate, Keys
from eigencache.records.base import SCOPES
from eigencache.records.quality import Quality, ReadingProtocol, SweepRecord, SweepSeries
from eigencache.studies.recommend.candidates import Search, coarse_plans, fine_plans, merged, settings_of
from eigencache.studies.recommend.choose import best_per_target, candidates_of, nearest
from eigencache.studies.recommend.halves import some_of
from eigencache.studies.recommend.key_rounding import measure_keys
from eigencache.studies.sweep import Plan, sweep_model

PASSES = ("coarse", "fine", "stated", "keys")


@dataclass(frozen=True)
class PCAResult:
    """What the search found; all empty where PCA was not measured.

    Args:
        sweeps: All measured points, by pass.
        best: The best setting within the budget of every target, largest ratio first.
        nearest: If no setting is within the budget: the nearest.
        keys: Key biases and the loss of rounded keys.
        left_out: Settings that could not be tried, each with its reason.
        refusal: Why PCA could not be measured.
    """

    sweeps: dict[str, SweepRecord] = field(default_factory=dict)
    best: Sequence[Candidate] = ()
    nearest: Candidate | None = None
    keys: Keys | None = None
    left_out: Sequence[str] = ()
    refusal: str = ""


def search_pca(
    session: Session,
    halves: tuple[Sequences, Sequences],
    calibration_sequences: Sequences,
    budget: Budget,
    protocol: ReadingProtocol,
    search: Search,
    *,
    force: bool,
    partials: Mapping[str, Path | None],
) -> PCAResult:
    """Measure PCA settings and choose the best of every target. The moments are freed when this returns.

    Args:
        session: Model and settings to run it with.
        halves: Text to choose on, and text to state the loss on.
        calibration_sequences: Text on which bases are fitted.
        budget: Allowed loss.
        protocol: Reading protocol.
        search: Extent of the search.
        force: Accept a held-out text that overlaps the calibration text.
        partials: Files that keep finished results, by the names of `PASSES`.

    Raises:
        CorpusError: The text overlaps the calibration text and `force` is false.
        ModelError: The model has fewer positions than a sequence has tokens.
        StatisticsError: The calibration set is too small for every setting, or scoring needs more memory than is allowed.
    """
    choosing, stating = halves
    scored_batches(session, choosing, protocol)  # raises before the calibration text is captured
    calibration = PCACalibration(session, calibration_sequences, scopes=SCOPES)

    def swept(name: str, text: Sequences, plans: Sequence[Plan]) -> SweepRecord:
        named = session.named(f"{name} pass")
        return sweep_model(named, text, calibration, plans, protocol, force=force, partial=partials[name])

    plans, left_out = coarse_plans(session.loaded.geometry, calibration, search)
    sweeps = {"coarse": swept("coarse", some_of(choosing, search.coarse_sequences), plans)}
    sweeps["fine"] = swept("fine", choosing, fine_plans(sweeps["coarse"], budget.nats, search))
    candidates = candidates_of(sweeps["fine"])
    best = best_per_target(candidates, budget)
    if best:
        sweeps["stated"] = swept("stated", stating, _stating_plans(best, sweeps["fine"]))
        stated = _qualities(sweeps["stated"])
        best = [candidate.model_copy(update={"stating": stated[candidate.name]}) for candidate in best]
    keys = measure_keys(
        session.named("rounded keys"),
        stating,
        calibration_sequences,
        calibration.rotations,
        protocol,
        partial=partials["keys"],
    )
    return PCAResult(sweeps, best, None if best else nearest(candidates), keys, left_out)


def _stating_plans(best: list[Candidate], fine: SweepRecord) -> list[Plan]:
    """Plan the chosen settings, and the first of them with a random basis as a control."""
    series = {point.quality.codec: s for s in fine.series for point in s.points}
    plans = [_plan(series[candidate.name], candidate.rank) for candidate in best]
    control = replace(plans[0].settings, basis="random", metric="frobenius")
    return merged([*plans, Plan(control, plans[0].bits, plans[0].ranks)])


def _plan(series: SweepSeries, rank: int) -> Plan:
    widths: dict[int, CoefficientBits] = {16: 16, 8: 8, 4: 4}
    return Plan(settings_of(series), widths[series.bits], (rank,))


def _qualities(record: SweepRecord) -> dict[str, Quality]:
    return {point.quality.codec: point.quality for series in record.series for point in series.points}
