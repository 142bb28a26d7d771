"""What compression costs: `sweep`, `evaluate` and `recommend`, all scored through the cache."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eigencache.api.opening import CALIBRATION_LENGTH, HELD_OUT_TEXT, TEXT, TOKENS, opened, packed, recipe_of
from eigencache.calibration.calibration_set import calibration_length
from eigencache.codec.pca import CoefficientBits
from eigencache.codec.saved.folder import check_replaceable, load_codec, save_codec
from eigencache.errors import BudgetError, CodecError, RecordError, StatisticsError
from eigencache.evaluate.prefix import Window
from eigencache.evaluate.tasks import task_named
from eigencache.fitting.pca import PCACalibration
from eigencache.fitting.pca_settings import PCASettings, Target
from eigencache.fitting.provenance import fitting_of
from eigencache.inputs import text_of
from eigencache.models.codec_check import codec_for
from eigencache.progress import Progress, silent
from eigencache.records.advice import DEFAULT_PPL, FAMILIES, Advice, Budget, Family
from eigencache.records.quality import EvaluationRecord, ReadingProtocol, SweepRecord
from eigencache.studies.evaluation import check_evaluation, evaluate_codecs
from eigencache.studies.recommend.recommend import check_families, recommend_model, recommend_sweep
from eigencache.studies.recommend.subject import check_same_model, read_subject
from eigencache.studies.sweep import (
    Plan,
    check_plans,
    codecs_of,
    control_plans,
    default_plans,
    needed_scopes,
    sweep_model,
)

if TYPE_CHECKING:
    from eigencache.api.opening import Model, TextLike, Tokenizer


def sweep(
    model: Model,
    tokenizer: Tokenizer = None,
    text: TextLike = HELD_OUT_TEXT,
    calibration_text: TextLike = TEXT,
    *,
    targets: Sequence[Target] | None = None,
    ranks: tuple[int | None, ...] | None = None,
    settings: PCASettings | None = None,
    bits: CoefficientBits = 16,
    controls: bool = False,
    tokens: int = 100_352,
    calibration_tokens: int = TOKENS,
    max_length: int = 1024,
    prefix: int | None = None,
    force: bool = False,
    partial: str | Path | None = None,
    **options: Any,
) -> SweepRecord:
    """Score low-rank compression through the cache at many ranks.

    Args:
        model: a name or folder, or a loaded model, which needs its `tokenizer`.
        tokenizer: a tokenizer, or the name of one.
        text: the held-out text that is scored.
        calibration_text: the text that bases are fitted on.
        targets: tensors to compress, one after the other. Default: all that the model caches.
        ranks: ranks to score; None in it is the full rank. Default: ten steps to the full rank.
        settings: scope, frame, metric and centering of the bases; `targets` replace its target. Default: per
            head, before rotation, Fisher.
        bits: bits of a stored coefficient, 16, 8 or 4.
        controls: score a basis pooled over heads and a random basis as well.
        tokens: tokens of `text` at most.
        calibration_tokens: tokens of `calibration_text` at most.
        max_length: tokens per scored sequence.
        prefix: tokens held compressed; the rest is scored. Default: half of a sequence.
        force: score a text that overlaps the calibration text as well.
        partial: file that results are kept in while the sweep runs, so that it can be resumed.
        **options: device, dtype, batch_size, seed, memory and on_progress, as for `probe`.

    Raises:
        EigencacheError: one of `eigencache.errors`.
    """
    settings = settings or PCASettings(metric="fisher")
    source, calibration_source = text_of(text), text_of(calibration_text)
    with opened(model, tokenizer, **options) as session:
        held_out = packed(session, source, tokens, max_length)
        if targets is None:
            plans = default_plans(session.loaded, settings, bits=bits, ranks=ranks)
        else:
            plans = [Plan(settings.of(one), bits, ranks) for one in dict.fromkeys(targets)]
        if controls:
            plans = list(dict.fromkeys(plans + control_plans(session.loaded, bits=bits, ranks=ranks)))
        check_plans(session.loaded, plans)
        fitted_on = packed(session, calibration_source, calibration_tokens, min(CALIBRATION_LENGTH, max_length))
        calibration = PCACalibration(session, fitted_on, scopes=needed_scopes(plans))
        protocol = ReadingProtocol(kind="prefix", length=prefix or max_length // 2)
        return sweep_model(session, held_out, calibration, plans, protocol, force=force, partial=_path(partial))


def evaluate(
    model: Model,
    tokenizer: Tokenizer = None,
    text: TextLike = HELD_OUT_TEXT,
    calibration_text: TextLike = TEXT,
    *,
    codec: str | Path | None = None,
    settings: PCASettings | None = None,
    target: Target | None = None,
    ranks: tuple[int | None, ...] | None = None,
    bits: CoefficientBits = 16,
    tokens: int = 32_768,
    calibration_tokens: int = TOKENS,
    max_length: int = 1024,
    prefix: int | None = None,
    chunk: int | None = None,
    window: int = 0,
    prompts: int = 8,
    tasks: Sequence[str] | None = None,
    lengths: Sequence[int] = (256,),
    save_to: str | Path | None = None,
    force: bool = False,
    partial: str | Path | None = None,
    **options: Any,
) -> EvaluationRecord:
    """Evaluate one way to compress a cache: likelihood, generation, retrieval and bytes.

    Args:
        model: a name or folder, or a loaded model, which needs its `tokenizer`.
        tokenizer: a tokenizer, or the name of one.
        text: the held-out text that is scored.
        calibration_text: the text that bases are fitted on.
        codec: folder of a saved codec to evaluate; None to fit a low-rank codec.
        settings: scope, frame and metric of the basis to fit. Default: per head, before rotation, Fisher.
        target: tensor to compress. Default: keys and values, or the latent of MLA.
        ranks: ranks to evaluate. Default: half of the width.
        bits: bits of a stored coefficient, 16, 8 or 4.
        tokens: tokens of `text` at most.
        calibration_tokens: tokens of `calibration_text` at most.
        max_length: tokens per sequence.
        prefix: tokens held compressed in the prefix protocol. Default: half of a sequence.
        chunk: tokens read at a time in the chunked protocol. Default: an eighth of a sequence.
        window: uncompressed recent tokens in the chunked protocol.
        prompts: prompts to generate from; 0 for none.
        tasks: retrieval tasks; None for all, () for none.
        lengths: context lengths of the tasks, in tokens.
        save_to: folder to save the fitted codec in; needs a single rank.
        force: score a text that overlaps the calibration text as well.
        partial: file that results are kept in while the evaluation runs, so that it can be resumed.
        **options: device, dtype, batch_size, seed, memory and on_progress, as for `probe`.

    Raises:
        EigencacheError: one of `eigencache.errors`.
    """
    save_to = _path(save_to)
    for task in tasks or ():
        task_named(task)
    if save_to and ranks and len(ranks) > 1:
        raise StatisticsError(f"`save_to` {save_to} saves one codec, and `ranks` has {len(ranks)}: give one rank")
    if codec and save_to:
        raise CodecError(f"`save_to` {save_to}: the codec of {codec} is saved already: leave out one of the two")
    source, saved = text_of(text), load_codec(codec) if codec else None
    if save_to:
        check_replaceable(save_to)
    protocols = (
        ReadingProtocol(kind="prefix", length=prefix or max_length // 2),
        ReadingProtocol(kind="chunked", length=chunk or max_length // 8, window=window),
    )
    with opened(model, tokenizer, **options) as session:
        held_out = packed(session, source, tokens, max_length)
        check_evaluation(session, held_out, protocols, prompts=prompts, tasks=tasks, lengths=lengths)
        codecs: Mapping[str, Any]
        if saved:
            own = codec_for(saved, session.loaded)
            calibration, codecs, fitting = saved, {own.name: own}, None
        else:
            wanted: Target = target or ("latent" if session.loaded.geometry.mla else "kv")
            chosen = (settings or PCASettings(metric="fisher")).of(wanted)
            plan = Plan(chosen, bits, ranks, shares=(0.5,))
            check_plans(session.loaded, [plan])
            length = min(CALIBRATION_LENGTH, max_length)
            fitted_on = packed(session, text_of(calibration_text), calibration_tokens, length)
            calibration = PCACalibration(session, fitted_on, scopes=(chosen.scope,))
            codecs = fitted = codecs_of(calibration, plan)
            fitting = fitting_of(next(iter(fitted.values())), chosen, calibration) if save_to else None
        record = evaluate_codecs(
            session,
            held_out,
            calibration,
            codecs,
            protocols,
            prompts=prompts,
            tasks=tasks,
            lengths=lengths,
            window=Window(window),
            force=force,
            partial=_path(partial),
        )
        if save_to and fitting:
            save_codec(save_to, next(iter(codecs.values())), *fitting)
        return record


def recommend(
    subject: str | Path,
    text: TextLike = HELD_OUT_TEXT,
    calibration_text: TextLike = TEXT,
    *,
    budget: Budget | None = None,
    families: Sequence[Family] = FAMILIES,
    model: str | None = None,
    tokens: int = 40_960,
    calibration_tokens: int = TOKENS,
    max_length: int = 1024,
    prefix: int | None = None,
    force: bool = False,
    partial: str | Path | None = None,
    device: str | None = None,
    dtype: str | None = None,
    on_progress: Progress = silent,
    **options: Any,
) -> Advice:
    """Recommend, for each use, what compresses a cache within a loss budget, with the command that makes the codec.

    Args:
        subject: the name of a model, or the JSON file that `probe`, `report` or `sweep` wrote. A sweep is advised from
            without measuring anything.
        text: the held-out text; settings are chosen on one half of it, their loss is stated on the other.
        calibration_text: the text that codecs are fitted on.
        budget: the loss that is allowed, a `Budget` of `eigencache.records.advice`: `Budget.of_nll("0.01")` in nats per
            token, or `Budget.of_ppl("1%")`. Default: 1 % of perplexity.
        families: what to measure: `pca`, `eigen` (the stored codec) and `live` (the cache while generating). Default: all.
        model: the model to use where the JSON of a report holds several.
        tokens: tokens of `text` at most.
        calibration_tokens: tokens of `calibration_text` at most.
        max_length: tokens per sequence.
        prefix: tokens held compressed. Default: half of a sequence.
        force: score a text that overlaps the calibration text as well.
        partial: name of the files that results are kept in while the search runs, so that it can be resumed.
        device: device to load the model to.
        dtype: number format to load the model in. Default: that of the probe, where there is one.
        on_progress: called with the name of the work, the units done and the units in all.
        **options: batch_size, seed and memory, as for `probe`.

    Raises:
        EigencacheError: one of `eigencache.errors`, such as `RecordError` for a file of another kind.
    """
    check_families(families)
    budget, name = Budget.of_ppl(DEFAULT_PPL) if budget is None else budget, str(subject)
    if not isinstance(budget, Budget):
        raise BudgetError(
            f"`budget` is {budget!r}: use Budget.of_nll('0.01') or Budget.of_ppl('1%') of eigencache.records.advice"
        )
    found = read_subject(name, model)
    if isinstance(found, SweepRecord):
        unused = options | {name: x for name, x in (("device", device), ("dtype", dtype)) if x}
        if unused:
            raise RecordError(f"{subject} is a sweep, so nothing is measured: leave out {', '.join(unused)}")
        return recommend_sweep(found, budget, name)
    probed = None if isinstance(found, str) else found
    dtype = dtype or (probed.model.dtype if probed else None)  # the hash of the model depends on it
    source, calibration_source = text_of(text), text_of(calibration_text)
    named = probed.model.name if probed else name
    with opened(named, device=device, dtype=dtype, on_progress=on_progress, **options) as session:
        held_out = packed(session, source, tokens, max_length)
        if probed:
            check_same_model(session.loaded, probed, name)
        fitted_on = packed(session, calibration_source, calibration_tokens, min(CALIBRATION_LENGTH, max_length))
        learned = session.loaded.learned_positions  # their codec stores a mean for every position
        length = learned or min(calibration_length(session.loaded), max_length)
        alike = length == fitted_on.corpus.max_length
        return recommend_model(
            session,
            held_out,
            fitted_on,
            budget,
            ReadingProtocol(kind="prefix", length=prefix or max_length // 2),
            recipe_of(
                session, calibration_text, calibration_source.name, calibration_tokens, length, device=device, dtype=dtype
            ),
            families=families,
            codec_sequences=fitted_on if alike else packed(session, calibration_source, calibration_tokens, length),
            force=force,
            probe=probed,
            subject=name,
            partial=_path(partial),
        )


def _path(given: str | Path | None) -> Path | None:
    return Path(given) if given else None
