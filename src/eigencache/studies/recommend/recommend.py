"""Advice on compressing one model's cache: chosen on one half of the sequences, its loss stated on the other half.

Three passes: coarse over all ways, finer around the budget, and the chosen ones again on sequences that had no part in
the choice. From the record of a sweep, advice is given on what was measured there, and nothing is measured.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from eigencache.calibration.session import Session
from eigencache.codec.pca import CoefficientBits
from eigencache.corpora.sequences import Sequences
from eigencache.fitting.pca import PCACalibration
from eigencache.records.advice import Advice, Budget, Candidate, Keys
from eigencache.records.base import SCOPES
from eigencache.records.probe import ProbeRecord
from eigencache.records.provenance import Stopwatch
from eigencache.records.quality import Quality, ReadingProtocol, SweepRecord, SweepSeries
from eigencache.studies.recommend.candidates import Search, coarse_plans, fine_plans, merged, settings_of
from eigencache.studies.recommend.choose import best_per_target, candidates_of, nearest
from eigencache.studies.recommend.evidence import evidence_of
from eigencache.studies.recommend.halves import halves_of, repeats, some_of
from eigencache.studies.recommend.key_rounding import measure_keys
from eigencache.studies.recommend.limits import limits_of
from eigencache.studies.sweep import Plan, sweep_model

PASSES = ("coarse", "fine", "stated", "keys")


def recommend_model(
    session: Session,
    sequences: Sequences,
    calibration_sequences: Sequences,
    budget: Budget,
    protocol: ReadingProtocol,
    *,
    search: Search | None = None,
    force: bool = False,
    probe: ProbeRecord | None = None,
    subject: str | None = None,
    partial: Path | None = None,
) -> Advice:
    """Measure and choose; `probe`: what was found about the model before, for the evidence.

    `partial`: beside it, with the name of the pass, results are kept while it runs (`partial_paths`).
    Raises `CorpusError` for too few sequences and for a text that overlaps the calibration text (unless `force`),
    `StatisticsError` where the calibration text carries no basis at all.
    """
    watch, search = Stopwatch(), search or Search()
    choosing, stating = halves_of(sequences, protocol)
    calibration = PCACalibration(
        session,
        calibration_sequences,
        scopes=SCOPES,
    )
    paths = partial_paths(partial)

    def swept(which: str, text: Sequences, plans: Sequence[Plan]) -> SweepRecord:
        return sweep_model(
            session.named(f"{which} pass"),
            text,
            calibration,
            plans,
            protocol,
            force=force,
            partial=paths[which],
        )

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
        partial=paths["keys"],
    )
    fine, again = sweeps["fine"], repeats(choosing, stating)
    advice = Advice(
        subject=subject or session.loaded.name,
        model=fine.model,
        budget=budget,
        protocol=protocol,
        calibration=calibration_sequences.corpus,
        choosing=choosing.corpus,
        stating=stating.corpus,
        uncompressed_nll=fine.uncompressed_nll,
        chosen=best[0] if best else None,
        others=best[1:],
        nearest=None if best else nearest(candidates),
        keys=keys,
        evidence=[],
        unknown=[],
        sweeps=sweeps,
        run=watch.run(session.seed, {"batch_size": session.batch_size, "forced": force}),
        warnings=list(dict.fromkeys([*fine.warnings, *([again] if again else [])])),
    )
    return _argued(advice, left_out, probe)


def recommend_sweep(record: SweepRecord, budget: Budget, subject: str, keys: Keys | None = None) -> Advice:
    """Advice from what one sweep measured: nothing is measured, so it is chosen and stated on the same tokens.

    `keys`: what is known of their biases.
    """
    watch = Stopwatch()
    candidates = candidates_of(record)
    best = best_per_target(candidates, budget)
    advice = Advice(
        subject=subject,
        model=record.model,
        budget=budget,
        protocol=record.protocol,
        calibration=record.calibration,
        choosing=record.corpus,
        stating=None,
        uncompressed_nll=record.uncompressed_nll,
        chosen=best[0] if best else None,
        others=best[1:],
        nearest=None if best else nearest(candidates),
        keys=keys,
        evidence=[],
        unknown=[],
        sweeps={"given": record},
        run=watch.run(record.run.seed, {}),
        warnings=record.warnings,
    )
    return _argued(advice, [], None)


def partial_paths(partial: Path | None) -> dict[str, Path | None]:
    """Where each pass keeps its results while it runs."""
    return {which: partial.with_name(f"{partial.name}.{which}") if partial else None for which in PASSES}


def _argued(advice: Advice, left_out: list[str], probe: ProbeRecord | None) -> Advice:
    return advice.model_copy(update={"evidence": evidence_of(advice, probe), "unknown": limits_of(advice, left_out)})


def _stating_plans(best: list[Candidate], fine: SweepRecord) -> list[Plan]:
    """The chosen ones, and the first of them in a random basis, as a control."""
    series = {point.quality.codec: s for s in fine.series for point in s.points}
    plans = [_plan(series[candidate.name], candidate.rank) for candidate in best]
    control = replace(plans[0].settings, basis="random", metric="frobenius")
    return merged([*plans, Plan(control, plans[0].bits, plans[0].ranks)])


def _plan(series: SweepSeries, rank: int) -> Plan:
    widths: dict[int, CoefficientBits] = {16: 16, 8: 8, 4: 4}
    return Plan(settings_of(series), widths[series.bits], (rank,))


def _qualities(record: SweepRecord) -> dict[str, Quality]:
    return {point.quality.codec: point.quality for series in record.series for point in series.points}
