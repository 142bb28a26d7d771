"""Recommend what compresses a model's cache within a loss budget: a stored codec, a live cache, and a PCA setting.

A setting is chosen on one half of the sequences, and its loss is reported on the other half. The families are measured one
after the other, so that memory holds the vectors of one. `recommend_sweep` chooses a PCA setting from the record of a
finished sweep, without measuring.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from eigencache.calibration.session import Session
from eigencache.corpora.overlap import check_overlap
from eigencache.corpora.sequences import Sequences
from eigencache.errors import REFUSALS, CodecError, StatisticsError
from eigencache.memory import release
from eigencache.records.advice import FAMILIES, Advice, Budget, CodecAdvice, CodecFamily, Family, Keys
from eigencache.records.probe import ProbeRecord
from eigencache.records.provenance import Stopwatch
from eigencache.records.quality import ReadingProtocol, SweepRecord
from eigencache.studies.recommend.candidates import Search
from eigencache.studies.recommend.choose import best_per_target, candidates_of, nearest
from eigencache.studies.recommend.codecs import CodecSearch, measure_codecs, partial_names
from eigencache.studies.recommend.commands import Recipe
from eigencache.studies.recommend.evidence import evidence_of
from eigencache.studies.recommend.halves import halves_of, repeats
from eigencache.studies.recommend.limits import limits_of
from eigencache.studies.recommend.pca import PASSES, PCAResult, search_pca

CODEC_FAMILIES: tuple[CodecFamily, ...] = ("eigen", "live")


def recommend_model(
    session: Session,
    sequences: Sequences,
    calibration_sequences: Sequences,
    budget: Budget,
    protocol: ReadingProtocol,
    recipe: Recipe,
    *,
    families: Sequence[Family] = FAMILIES,
    codec_sequences: Sequences | None = None,
    search: Search | None = None,
    force: bool = False,
    probe: ProbeRecord | None = None,
    subject: str | None = None,
    partial: Path | None = None,
) -> Advice:
    """Measure a model and recommend, for each use, what compresses its cache within a loss budget.

    Args:
        session: Model and settings to run it with.
        sequences: Held-out text. The first half chooses, the second half reports the loss.
        calibration_sequences: Text on which bases are fitted.
        budget: Allowed loss.
        protocol: Reading protocol.
        recipe: Names the commands that make the recommended codecs.
        families: Families to measure.
        codec_sequences: The same text in the sequences that `eigen` and `live` are fitted on. Default:
            `calibration_sequences`.
        search: Extent of the search. Default: `Search()`.
        force: Accept a held-out text that overlaps the calibration text.
        probe: Record of an earlier probe, cited in the evidence. Default: none.
        subject: Name of the model in the record. Default: the model's name.
        partial: Base path of files that keep the finished results of each pass, to resume from (`partial_paths`).
            Default: none.

    Raises:
        CorpusError: The text has too few sequences, or overlaps the calibration text and `force` is false.
        StatisticsError: No family suits the model and the text.
    """
    watch, search = Stopwatch(), search or Search()
    choosing, stating = halves_of(sequences, protocol)
    fitted_on = codec_sequences or calibration_sequences
    overlap = check_overlap(sequences.ids, fitted_on.ids, force=force)
    paths = partial_paths(partial)
    pca = PCAResult()
    if "pca" in families:
        halves, text = (choosing, stating), calibration_sequences
        try:
            pca = search_pca(session, halves, text, budget, protocol, search, force=force, partials=paths)
        except REFUSALS as error:
            pca = PCAResult(refusal=str(error))
        release()
    wanted = CodecSearch(fitted_on, choosing, stating, budget, protocol, recipe, search.rates)
    codecs = measure_codecs(session, wanted, [family for family in CODEC_FAMILIES if family in families], paths)
    repetition = repeats(choosing, stating)
    said = [*choosing.corpus.warnings, *calibration_sequences.corpus.warnings, overlap, repetition]
    return assembled(
        pca,
        codecs,
        recipe,
        probe,
        subject=subject or session.loaded.name,
        model=session.loaded.record("the cache itself"),
        budget=budget,
        protocol=protocol,
        calibration=calibration_sequences.corpus,
        choosing=choosing.corpus,
        stating=stating.corpus,
        run=watch.run(session.seed, {"batch_size": session.batch_size, "forced": force, "families": ",".join(families)}),
        warnings=list(dict.fromkeys(filter(None, said))),
    )


def check_families(families: Sequence[str]) -> None:
    """Raise `CodecError` for an unknown family, or for none."""
    unknown = [family for family in families if family not in FAMILIES]
    if unknown or not families:
        problem = f"`families` {unknown[0]}: no such family" if unknown else "`families` is empty"
        raise CodecError(f"{problem}. Choose from {', '.join(FAMILIES)}.")


def recommend_sweep(record: SweepRecord, budget: Budget, subject: str) -> Advice:
    """Recommend a PCA setting from the record of a sweep, without measuring.

    The loss is therefore reported on the tokens used for the choice.

    Args:
        record: Record of the sweep.
        budget: Allowed loss.
        subject: Name of the model or file in the record.
    """
    watch = Stopwatch()
    return assembled(
        chosen_in(record, budget),
        [],
        Recipe.of_sweep(record),
        None,
        subject=subject,
        model=record.model,
        budget=budget,
        protocol=record.protocol,
        calibration=record.calibration,
        choosing=record.corpus,
        stating=None,
        run=watch.run(record.run.seed, {}),
        warnings=record.warnings,
    )


def chosen_in(record: SweepRecord, budget: Budget, keys: Keys | None = None) -> PCAResult:
    """Return the best settings of a sweep within a budget.

    Args:
        record: Record of the sweep.
        budget: Allowed loss.
        keys: Biases of the keys and their effect, if measured. Default: unknown.
    """
    candidates = candidates_of(record)
    best = best_per_target(candidates, budget)
    return PCAResult({"given": record}, best, None if best else nearest(candidates), keys)


def assembled(
    pca: PCAResult, codecs: Sequence[CodecAdvice], recipe: Recipe, probe: ProbeRecord | None, **fields: Any
) -> Advice:
    """Return the recommendation of all families with its commands, its evidence and its limits.

    Args:
        pca: Result of the search for PCA settings.
        codecs: Results of the other families.
        recipe: Names the commands of the PCA settings.
        probe: Record of an earlier probe, cited in the evidence.
        **fields: Fields of `Advice` about the model, the texts and the run.

    Raises:
        StatisticsError: Nothing was measured.
    """
    losses = [pca.sweeps[name].uncompressed_nll for name in ("fine", "given") if name in pca.sweeps]
    losses += [one.uncompressed_nll for one in codecs if one.uncompressed_nll is not None]
    if not losses:
        raise StatisticsError(next(filter(None, [pca.refusal, *(why for one in codecs for why in one.left_out)])))
    best = [recipe.with_command(candidate) for candidate in pca.best]
    advice = Advice(
        uncompressed_nll=losses[0],
        chosen=best[0] if best else None,
        others=best[1:],
        nearest=pca.nearest,
        keys=pca.keys,
        codecs=list(codecs),
        pca_refusal=pca.refusal,
        evidence=[],
        unknown=[],
        sweeps=pca.sweeps,
        **fields,
    )
    return advice.model_copy(
        update={"evidence": evidence_of(advice, probe), "unknown": limits_of(advice, list(pca.left_out))}
    )


def partial_paths(partial: Path | None) -> dict[str, Path | None]:
    """Return the file that keeps the partial results of each pass: `partial` with the pass's name appended."""
    names = [*PASSES, *(name for family in CODEC_FAMILIES for name in partial_names(family))]
    return {name: partial.with_name(f"{partial.name}.{name}") if partial else None for name in names}
