"""Probe a model: measure the spectra of cached tensors on a text, and mark statistics that the sample cannot support.

The text is read once. Each batch is captured and added to moments, from which all statistics are computed at the end.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from typing import Any, Literal

import torch

from eigencache.calibration.accumulator import SAMPLED, WIDEST, Accumulator, shapes_of
from eigencache.calibration.moments import CapturedMoments, captured_by_name, gather
from eigencache.calibration.session import Session
from eigencache.calibration.sinks import measure_sinks
from eigencache.corpora.sequences import Sequences
from eigencache.errors import StatisticsError
from eigencache.geometry import kind_and_frame
from eigencache.models.capture import Capture
from eigencache.progress import silent
from eigencache.records.base import SCOPES, Scope
from eigencache.records.probe import ClassicRow, FrameComparison, ProbeRecord, Spectrum
from eigencache.spectral.measure import DOUBTFUL_BELOW, REFUSED_BELOW, Place, measure_both
from eigencache.spectral.moments import Moments
from eigencache.spectral.wide import DECOMPOSED
from eigencache.studies.legacy_probe import (
    REPEATED,
    SAMPLES,
    classic_rows,
    distinct_contexts,
    repeated_samples,
)

FrameChoice = Literal["pre", "post", "both"]


@dataclass(frozen=True)
class ProbeSettings:
    """Extent of a probe.

    Args:
        layers: Indices of layers to probe. Default: all.
        frame: Keys before RoPE (`pre`), after it (`post`), or both.
        scopes: Scopes of the spectra.
        demonstration: Whether to run the original probe on its four repeated sentences too.
        gradients: Whether to measure the gradient energy of first tokens too, which takes backward passes.
    """

    layers: tuple[int, ...] | None = None
    frame: FrameChoice = "both"
    scopes: tuple[Scope, ...] = SCOPES
    demonstration: bool = True
    gradients: bool = False


def probe_model(session: Session, sequences: Sequences, settings: ProbeSettings | None = None) -> ProbeRecord:
    """Probe a model on a text. Progress is reported after every batch and every spectrum.

    Args:
        session: Model and settings to run it with.
        sequences: Text to read.
        settings: Extent of the probe. Default: `ProbeSettings()`.

    Raises:
        StatisticsError: The requested frame was not captured, or an error of `gather`.
    """
    settings = settings or ProbeSettings()
    alone = settings.scopes == ("all",)  # the user waits for this scope only, so it may take minutes
    widest, sampled = (DECOMPOSED, DECOMPOSED) if alone else (WIDEST, SAMPLED)
    gathered = gather(session, sequences, settings.scopes, layers=settings.layers, widest=widest, sampled=sampled)
    return probe_gathered(session, gathered, settings)


def probe_gathered(session: Session, gathered: CapturedMoments, settings: ProbeSettings) -> ProbeRecord:
    """Compute the probe from captured moments.

    Args:
        session: Model and settings to run it with.
        gathered: Moments, gathered with the scopes and layers of `settings`.
        settings: Extent of the probe.

    Raises:
        StatisticsError: The requested frame was not captured.
    """
    corpus, notes = gathered.sequences.corpus, gathered.notes
    spectra = _spectra(gathered.accumulator, corpus.distinct_8grams, session)
    classic = classic_rows(spectra, "this text")
    if settings.demonstration:
        classic += _demonstration(session, settings)
    frames = _frame_comparisons(spectra)
    unwanted = {"pre": "post_rope", "post": "pre_rope", "both": ""}[settings.frame]
    spectra = [spectrum for spectrum in spectra if spectrum.frame != unwanted]
    if not spectra:
        raise StatisticsError(f"`frame` {settings.frame}: {'; '.join(notes) or 'no tensor was captured in this frame'}")
    with gathered.watch:
        sinks = measure_sinks(session, gathered.sequences, settings.layers, gradients=settings.gradients)
    notices = [*corpus.warnings, *session.loaded.geometry.notes, *notes]
    options: dict[str, Any] = asdict(settings) | {
        "batch_size": session.batch_size,
        "seed": session.seed,
        "memory": session.memory,
        "layers": ",".join(map(str, settings.layers)) if settings.layers else "all",
        "scopes": ",".join(settings.scopes),
        "folds": gathered.accumulator.folds,
    }
    return ProbeRecord(
        model=session.loaded.record(gathered.style),
        corpus=corpus,
        run=gathered.watch.run(session.seed, options),
        spectra=spectra,
        frames=frames,
        classic=classic,
        sinks=sinks,
        warnings=[*notices, *_support_warnings(spectra)],
    )


def _spectra(accumulator: Accumulator, contexts: int, session: Session) -> list[Spectrum]:
    """Compute every spectrum, centered and uncentered; n_eff after RoPE is capped at its value before it."""
    places = list(accumulator.places())
    whole = len(places) + len(accumulator.samplings)
    spectra: list[Spectrum] = []
    before: dict[tuple, float | None] = {}
    for done, (place, moments) in enumerate(chain(places, _wide_places(accumulator)), 1):
        key = (place.layer_idx, place.head, place.kind, place.scope)
        both = measure_both(place, moments, distinct_contexts=contexts, at_most=before.get(key), seed=session.seed)
        spectra += both
        if place.frame == "pre_rope":
            before[key] = both[0].effective_vectors
        session.on_progress("spectra", done, whole)
    return spectra


def _wide_places(accumulator: Accumulator) -> Iterator[tuple[Place, Moments]]:
    """Yield all layers of the tensors that are too wide for a matrix, one at a time to save memory."""
    for name, sampling in accumulator.samplings.items():
        yield Place(None, None, *kind_and_frame(name), "all"), sampling.sample.moments()


def _demonstration(session: Session, settings: ProbeSettings) -> list[ClassicRow]:
    """Run the original probe on its own kind of text. Its samples repeat four, so each of the four is read once."""
    loaded = session.loaded
    samples = repeated_samples(loaded)
    accumulator = None
    with Capture(loaded.model, loaded.geometry, layers=settings.layers) as capture:
        for index, sample in enumerate(samples):
            tensors = captured_by_name(capture.run(torch.tensor([sample], device=loaded.device)))
            if accumulator is None:
                accumulator = Accumulator(
                    shapes_of(tensors),
                    ("layer",),
                    sequences=len(samples),
                    tokens=sum(map(len, samples)),
                    budget=session.memory,
                )
            accumulator.add(tensors, [index], [len(sample)])
    assert accumulator is not None
    distinct = distinct_contexts(samples)
    spectra = _spectra(accumulator, distinct, session.reporting(silent))
    return classic_rows(spectra, REPEATED, copies=SAMPLES // len(samples), distinct=distinct)


def _frame_comparisons(spectra: Sequence[Spectrum]) -> list[FrameComparison]:
    """Compare keys before and after RoPE, per layer."""
    by_frame = {(s.kind, s.layer_idx, s.frame, s.centered): s for s in spectra if s.scope == "layer"}
    comparisons = []
    for (kind, layer_idx, frame, centered), post in by_frame.items():
        pre = by_frame.get((kind, layer_idx, "pre_rope", True))
        if frame != "post_rope" or not centered or pre is None or layer_idx is None:
            continue
        variance_post, variance_pre = sum(post.eigenvalues), sum(pre.eigenvalues)
        comparisons.append(
            FrameComparison(
                layer_idx=layer_idx,
                kind=kind,
                spread_post_rope=post.spread,
                spread_pre_rope=pre.spread,
                spread_pre_rope_uncentered=by_frame[kind, layer_idx, "pre_rope", False].spread,
                variance_post_rope=variance_post,
                variance_pre_rope=variance_pre,
                rotated_mean_share=(variance_post - variance_pre) / variance_post if variance_post else 0.0,
                rank_90_post_rope=post.rank_90,
                rank_90_pre_rope=pre.rank_90,
            )
        )
    return comparisons


def _support_warnings(spectra: Sequence[Spectrum]) -> list[str]:
    """Warn of refused and of doubtful ranks, with the lowest support of each tensor and scope.

    Doubts about the tail of a spectrum are recorded in the spectrum itself.
    """
    worst: dict[str, float] = {}
    for s in spectra:
        if s.centered and s.support < DOUBTFUL_BELOW:
            place = f"{s.name} at scope {s.scope}"
            worst[place] = min(worst.get(place, s.support), s.support)
    bounds = (("refused", 0, REFUSED_BELOW), ("doubtful", REFUSED_BELOW, DOUBTFUL_BELOW))
    lines = []
    for verdict, low, high in bounds:
        if places := [f"{place} ({support:.2g})" for place, support in worst.items() if low <= support < high]:
            lines.append(f"ranks {verdict}, fewer than {high} independent vectors per dimension: {', '.join(places)}")
    return lines
