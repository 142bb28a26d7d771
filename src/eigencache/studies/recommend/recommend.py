"""Recommend a compression setting for a model's cache that stays within a loss budget.

The setting is chosen on one half of the sequences, and its loss is reported on the other half. Three passes measure it: a
coarse pass over all settings, a fine pass near the budget, and a pass of the chosen settings on the test half.
`recommend_sweep` chooses from the record of a finished sweep, without measuring.
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
    """Measure a model and recommend a compression setting within a loss budget.

    Args:
        session: Model and settings to run it with.
        sequences: Held-out text. The first half chooses, the second half reports the loss.
        calibration_sequences: Text on which bases are fitted.
        budget: Allowed loss.
        protocol: Reading protocol.
        search: Extent of the search. Default: `Search()`.
        force: Accept a held-out text that overlaps the calibration text.
        probe: Record of an earlier probe, cited in the evidence. Default: none.
        subject: Name of the model in the record. Default: the model's name.
        partial: Base path of files that keep the finished results of each pass, to resume from (`partial_paths`).
            Default: none.

    Raises:
        CorpusError: The text has too few sequences, or overlaps the calibration text and `force` is false.
        StatisticsError: The calibration set is too small for every setting.
    """
    watch, search = Stopwatch(), search or Search()
    choosing, stating = halves_of(sequences, protocol)
    calibration = PCACalibration(
        session,
        calibration_sequences,
        scopes=SCOPES,
    )
    paths = partial_paths(partial)

    def swept(name: str, text: Sequences, plans: Sequence[Plan]) -> SweepRecord:
        return sweep_model(
            session.named(f"{name} pass"),
            text,
            calibration,
            plans,
            protocol,
            force=force,
            partial=paths[name],
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
    fine, repetition = sweeps["fine"], repeats(choosing, stating)
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
        warnings=list(dict.fromkeys([*fine.warnings, *([repetition] if repetition else [])])),
    )
    return _argued(advice, left_out, probe)


def recommend_sweep(record: SweepRecord, budget: Budget, subject: str, keys: Keys | None = None) -> Advice:
    """Recommend a setting from the record of a sweep, without measuring.

    The loss is therefore reported on the tokens used for the choice.

    Args:
        record: Record of the sweep.
        budget: Allowed loss.
        subject: Name of the model or file in the record.
        keys: Biases of the keys and their effect, if measured. Default: unknown.
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
    """Return the file that keeps the partial results of each pass: `partial` with the pass's name appended."""
    return {name: partial.with_name(f"{partial.name}.{name}") if partial else None for name in PASSES}


def _argued(advice: Advice, left_out: list[str], probe: ProbeRecord | None) -> Advice:
    """Add the evidence and the limits to a recommendation."""
    return advice.model_copy(update={"evidence": evidence_of(advice, probe), "unknown": limits_of(advice, left_out)})


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
