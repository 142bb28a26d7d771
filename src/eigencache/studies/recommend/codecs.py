"""Measure the codecs `eigen` (stored) and `live` at several rates, and choose the smallest of each within a loss budget.

All rates of a family come from one fit and are scored in one pass over the text. A finished family is kept in the partial
file, so that a resumed run neither fits nor scores it again.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

from eigencache.calibration.calibration_set import CalibrationSet
from eigencache.calibration.metrics import METRIC_TOKENS, Metrics
from eigencache.calibration.session import Session
from eigencache.codec.byte_ledger import ledger, paid_back_at
from eigencache.codec.eigen.codec import EigenCodec
from eigencache.codec.live.codec import LiveCodec
from eigencache.codec.placement import placed
from eigencache.corpora.sequences import Sequences
from eigencache.errors import (
    REFUSALS,
    BudgetError,
    StatisticsError,
)
from eigencache.evaluate.codec_scoring import CodecScores, score_codecs
from eigencache.evaluate.resume import ResumableResults
from eigencache.fitting.eigen import fit_eigen
from eigencache.fitting.eigen_search import at_bits
from eigencache.fitting.heldout_score import CONTEXT
from eigencache.fitting.live import VECTORS, LiveSettings, fit_live
from eigencache.kernels.packed.format import BLOCK
from eigencache.memory import release
from eigencache.records.advice import Budget, CodecAdvice, CodecCandidate, CodecFamily
from eigencache.records.quality import Quality, ReadingProtocol
from eigencache.studies.recommend.choose import nearest, within
from eigencache.studies.recommend.commands import Recipe

NAMES: dict[CodecFamily, str] = {"eigen": "stored codec", "live": "live cache"}


@dataclass(frozen=True)
class CodecSearch:
    """Texts, budget and rates of the measurement of codecs.

    Args:
        calibration: Text on which codecs are fitted; the fit holds out its last eighth.
        choosing: Text to choose on.
        stating: Text to state the loss of the choice on. None: the loss is known on `choosing` only.
        budget: Allowed loss.
        protocol: Reading protocol.
        recipe: Names the command of a codec.
        rates: Rates by family, ascending.
        metrics: Error metrics that were measured on the calibration text before, by name.
        shared: Fit all families on the same vectors. By default `live` samples its own, as its command does, and the vectors
            of `eigen` are freed before.
        most_vectors: Most vectors to fit on. None: as many as the memory allows.
        metric_tokens: Tokens that other metrics are measured on.
        tolerance: Relative tolerance of a rate of `eigen`. The rate that was reached is recorded. A larger one is faster.
    """

    calibration: Sequences
    choosing: Sequences
    stating: Sequences | None
    budget: Budget
    protocol: ReadingProtocol
    recipe: Recipe
    rates: Mapping[CodecFamily, tuple[float, ...]]
    metrics: dict[str, Metrics] = field(default_factory=dict)
    shared: bool = False
    most_vectors: int | None = None
    metric_tokens: int = METRIC_TOKENS
    tolerance: float = 0.03


class _Made(NamedTuple):
    """A codec at one rate; `coded_bits`: bits of a coded token of `eigen`, as measured on held-out sequences."""

    codec: EigenCodec | LiveCodec
    rate: float
    coded_bits: float | None = None


def partial_names(family: CodecFamily) -> tuple[str, str, str]:
    """Return the names of the files that keep results of a family: finished, scores to choose by, and stated scores."""
    return family, f"{family}.choosing", f"{family}.stating"


def measure_codecs(
    session: Session, search: CodecSearch, families: Sequence[CodecFamily], partials: Mapping[str, Path | None]
) -> list[CodecAdvice]:
    """Fit the codecs of every family, score them, and choose the smallest of each family within the budget.

    Args:
        session: Model and settings to run it with.
        search: Texts, budget and rates.
        families: Families to measure, one after the other.
        partials: Files that keep finished results, by the names of `partial_names`.

    Returns:
        The codecs of every family with their losses. If the model or the text does not suit a family: the reason.
    """
    try:
        source = CalibrationSet(
            session.named("codecs"),
            search.calibration,
            search.most_vectors,
            search.metrics,
            metric_tokens=search.metric_tokens,
        )
    except REFUSALS as error:
        return [_refused(family, [f"{family}: {error}"]) for family in families]
    return [_measured_once(session.named(NAMES[family]), source, search, family, partials) for family in families]


def _measured_once(
    session: Session,
    source: CalibrationSet,
    search: CodecSearch,
    family: CodecFamily,
    partials: Mapping[str, Path | None],
) -> CodecAdvice:
    """Measure a family, or return its finished results from the partial file."""
    texts = (search.calibration, search.choosing, *([search.stating] if search.stating else []))
    key = {
        "model": session.loaded.sha256,
        "texts": [text.corpus.model_dump() for text in texts],
        "budget": search.budget.nats,
        "protocol": search.protocol.model_dump(),
        "recipe": repr(search.recipe),
        "rates": search.rates[family],
    }
    finished, *scores = (partials.get(name) for name in partial_names(family))
    kept = ResumableResults(finished, key)
    if kept.done:
        return CodecAdvice.model_validate(kept.done[0])
    try:
        advice = _measured(session, source, search, family, *scores)
    except REFUSALS as error:
        return _refused(family, [f"{family}: {error}"])
    release()
    kept.add(json.loads(advice.model_dump_json()))
    return advice


def _measured(
    session: Session,
    source: CalibrationSet,
    search: CodecSearch,
    family: CodecFamily,
    choosing: Path | None,
    stating: Path | None,
) -> CodecAdvice:
    made, left_out = (_eigen if family == "eigen" else _live)(session, source, search)
    release()  # the vectors of the fit
    if not made:
        return _refused(family, left_out)
    calibration = search.calibration.corpus

    def scored(codecs: list[_Made], text: Sequences, what: str, partial: Path | None) -> CodecScores:
        placed_codecs = {m.codec.name: placed(m.codec, session.loaded.device) for m in codecs}
        named = session.named(what)
        return score_codecs(named, text, placed_codecs, search.protocol, calibration=calibration, partial=partial)

    scores = scored(made, search.choosing, "choosing", choosing)
    candidates = [
        _candidate(family, m, scores.quality[m.codec.name], session.loaded.geometry.values_per_token, search.recipe)
        for m in made
    ]
    chosen = next(iter(within(candidates, search.budget)), None)
    if chosen and search.stating:
        best = [m for m in made if m.codec.name == chosen.name]
        stated = scored(best, search.stating, "stating", stating).quality[chosen.name]
        index = candidates.index(chosen)
        chosen = candidates[index] = chosen.model_copy(update={"stating": stated})
    return CodecAdvice(
        family=family,
        candidates=candidates,
        chosen=chosen,
        nearest=None if chosen else nearest(candidates),
        calibration=calibration,
        uncompressed_nll=scores.uncompressed_nll,
        left_out=left_out,
    )


def _refused(family: CodecFamily, reasons: list[str]) -> CodecAdvice:
    return CodecAdvice(
        family=family,
        candidates=[],
        chosen=None,
        nearest=None,
        calibration=None,
        uncompressed_nll=None,
        left_out=reasons,
    )


def _eigen(session: Session, source: CalibrationSet, search: CodecSearch) -> tuple[list[_Made], list[str]]:
    """Return `eigen` at every rate, and the reason for every rate that it cannot have."""
    source = source if search.shared else replace(source, session=session)
    fit, rates = fit_eigen(source), search.rates["eigen"]
    made: list[_Made] = []
    left_out: list[str] = []
    for done, bits in enumerate(rates):
        session.on_progress(f"fitting {len(rates)} rates", done, len(rates))
        try:
            point = at_bits(fit, bits, name=f"eigen · {bits:g} bits", tolerance=search.tolerance)
        except BudgetError as error:
            left_out.append(f"eigen at {bits:g} bits per value: {error}")
        else:
            reached = float(f"{fit.bits_per_value(point, CONTEXT):.3g}")
            made.append(_Made(point.codec, reached, point.coded_bits))
    session.on_progress(f"fitting {len(rates)} rates", len(rates), len(rates))
    return made, left_out


def _live(session: Session, source: CalibrationSet, search: CodecSearch) -> tuple[list[_Made], list[str]]:
    """Return the live codec at every rate.

    Raises:
        StatisticsError: The compressed prefix, or half of a calibration sequence, is too short for one packed block.
    """
    settings = LiveSettings()
    needed = source.sinks + settings.window + BLOCK
    if search.protocol.length < needed:
        raise StatisticsError(
            f"a prefix of {search.protocol.length} tokens is too short: no block of {BLOCK} tokens is ever packed. "
            f"Use `prefix` ≥ {needed}."
        )
    if (length := search.calibration.corpus.max_length) < 2 * needed:  # its fit scores the second half of a sequence
        raise StatisticsError(
            f"calibration sequences of {length} tokens are too short to fit a live codec. Use `max_length` ≥ {2 * needed}."
        )
    fit = fit_live(source if search.shared else replace(source, session=session, most_vectors=VECTORS), settings)
    return [_Made(fit.at_bits(bits, f"live · {bits:g} bits"), bits) for bits in search.rates["live"]], []


def _candidate(family: CodecFamily, made: _Made, quality: Quality, values_per_token: int, recipe: Recipe) -> CodecCandidate:
    (longer,) = ledger(made.codec, values_per_token, (CONTEXT,), coded_bits=made.coded_bits)
    return CodecCandidate(
        name=made.codec.name,
        family=family,
        rate=made.rate,
        longer=longer,
        break_even_context=paid_back_at(made.codec, values_per_token, coded_bits=made.coded_bits),
        choosing=quality,
        command=recipe.codec(family, made.rate),
    )
