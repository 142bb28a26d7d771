"""Look at a model: `probe`, `score`, `report`; and at earlier probes: `compare`."""

from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eigencache.api.opening import HELD_OUT_TEXT, TEXT, TOKENS, opened, packed, recipe_of
from eigencache.api.probe import Probe
from eigencache.calibration.moments import gather
from eigencache.calibration.session import Session
from eigencache.corpora.sequences import pack
from eigencache.corpora.text import Text
from eigencache.errors import EigencacheError
from eigencache.evaluate.resume import ResumableResults
from eigencache.inputs import check_names, several, text_of
from eigencache.models.sources import BUNDLED
from eigencache.progress import Progress, silent
from eigencache.records.advice import DEFAULT_PPL, Budget, ReportRecord, Verdict
from eigencache.records.probe import ProbeRecord, ScoreRecord
from eigencache.report.core.table import Table
from eigencache.report.probe.comparison import compare_table
from eigencache.studies.model_quality import score_model
from eigencache.studies.probe import ProbeSettings, probe_gathered, probe_model
from eigencache.studies.recommend.commands import Recipe
from eigencache.studies.recommend.verdict import judge

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def probe(
    model: "str | PreTrainedModel",
    tokenizer: "str | PreTrainedTokenizerBase | None" = None,
    text: str | Iterable[str] | Text = TEXT,
    *,
    tokens: int | None = TOKENS,
    max_length: int | None = None,
    settings: ProbeSettings | None = None,
    device: str | None = None,
    dtype: str | None = None,
    batch_size: int = 8,
    seed: int = 0,
    memory: int | None = None,
    on_progress: Progress = silent,
) -> Probe:
    """Probe the KV cache of a model on a text. The model's weights, hooks and modes are as before afterwards.

    Args:
        model: a name or folder, or a model loaded with `from_pretrained`, which then needs its `tokenizer`.
        tokenizer: a tokenizer, or the name of one.
        text: a specification as on the command line (`stdlib`, a file, `hf:…`), a path, the text itself, or an iterable of
            strings, paths or rows with a field "text".
        tokens: tokens to use at most; None for all.
        max_length: tokens per sequence. Default: 512, or as many as the model has positions for.
        settings: layers, frames and scopes to look at.
        device: device to load a model to.
        dtype: number format to load a model in.
        batch_size: sequences per forward pass.
        seed: seed of the bootstrap.
        memory: bytes that the work may take beside the model; None for 60 % of what is free.
        on_progress: called with the name of the work, the units done and the units in all.

    Returns:
        The probe: statistics by layer as attributes, plots, tables and the record.

    Raises:
        EigencacheError: one of `eigencache.errors`, in one line that says what to do.
    """
    source = text_of(text)
    with opened(
        model,
        tokenizer,
        device=device,
        dtype=dtype,
        batch_size=batch_size,
        seed=seed,
        memory=memory,
        on_progress=on_progress,
    ) as session:
        sequences = packed(session, source, tokens, max_length or session.loaded.default_length)
        return Probe(probe_model(session, sequences, settings))


def score(
    model: "str | PreTrainedModel",
    tokenizer: "str | PreTrainedTokenizerBase | None" = None,
    text: str | Iterable[str] | Text = HELD_OUT_TEXT,
    *,
    tokens: int | None = TOKENS,
    max_length: int = 2048,
    device: str | None = None,
    dtype: str | None = None,
    seed: int = 0,
    memory: int | None = None,
    on_progress: Progress = silent,
) -> ScoreRecord:
    """Score how well a model predicts held-out text, by position, and whether it copies from its context.

    Args:
        model: a name or folder, or a model loaded with `from_pretrained`, which then needs its `tokenizer`.
        tokenizer: a tokenizer, or the name of one.
        text: the held-out text, as for `probe`.
        tokens: tokens to use at most; None for all.
        max_length: tokens per sequence.
        device: device to load a model to.
        dtype: number format to load a model in.
        seed: seed of the random tokens that the model should copy.
        memory: bytes that the work may take beside the model; None for 60 % of what is free.
        on_progress: called with the name of the work, the units done and the units in all.

    Returns:
        The loss in nats per token, in all and by position, and the accuracy of copying in [0, 1].

    Raises:
        EigencacheError: one of `eigencache.errors`, such as `StatisticsError` for a pass that needs more than `memory`.
    """
    source = text_of(text)
    options = {"device": device, "dtype": dtype, "seed": seed, "memory": memory, "on_progress": on_progress}
    with opened(model, tokenizer, **options) as session:  # type: ignore[arg-type]
        return score_model(session, packed(session, source, tokens, max_length))


def compare(probes: Sequence[Probe | ProbeRecord | str | Path] | Probe | ProbeRecord | str | Path) -> Table:
    """Return a table that compares models from their probes.

    Args:
        probes: probes, their records, or the JSON files that `eigencache probe --output` wrote; one or several.

    Raises:
        RecordError: a file cannot be read, or holds something else.
    """
    return compare_table([record_of(one) for one in several(probes)])


def record_of(source: Probe | ProbeRecord | str | Path) -> ProbeRecord:
    """Return the record of a probe, read from its file where a path is given."""
    if isinstance(source, Probe):
        return source.record
    return source if isinstance(source, ProbeRecord) else ProbeRecord.load(source)


def report(
    models: Sequence[str] | str = BUNDLED,
    text: str | Iterable[str] | Text = TEXT,
    held_out: str | Iterable[str] | Text | None = HELD_OUT_TEXT,
    *,
    tokens: int = TOKENS,
    held_out_tokens: int = 12_288,
    max_length: int | None = None,
    budget: Budget | None = None,
    device: str | None = None,
    dtype: str | None = None,
    batch_size: int = 8,
    seed: int = 0,
    memory: int | None = None,
    on_progress: Progress = silent,
    partial: str | Path | None = None,
) -> ReportRecord:
    """Probe models and measure what compressing their caches costs, for one report.

    Args:
        models: one or several names or folders.
        text: the text to probe, as for `probe`.
        held_out: the text that compression is scored on; None to measure no compression.
        tokens: tokens of `text` at most.
        held_out_tokens: tokens of `held_out` at most.
        max_length: tokens per sequence. Default: 512, or as many as the model has positions for.
        budget: the loss that is allowed. Default: 1 % of perplexity.
        device: device to load models to.
        dtype: number format to load models in.
        batch_size: sequences per forward pass.
        seed: seed of everything random.
        memory: bytes that the work may take beside the model; None for 60 % of what is free.
        on_progress: called with the name of the work, the units done and the units in all.
        partial: file that finished models are kept in, so that an interrupted report can be resumed.

    Returns:
        The probes, and a verdict for each model: advice, or the reason why there is none.

    Raises:
        EigencacheError: one of `eigencache.errors`, such as `ModelError` for a model that does not exist.
    """
    models, partial = several(models), None if partial is None else Path(partial)
    check_names(models)
    source, scored = text_of(text), None if held_out is None else text_of(held_out)
    budget, settings, record = budget or Budget.of_ppl(DEFAULT_PPL), ProbeSettings(), ReportRecord(probes=[])
    loading: dict[str, Any] = {"device": device, "dtype": dtype}
    texts = [(one.name, one.sha256) for one in (source, scored) if one is not None]
    limits = [tokens, held_out_tokens, max_length, budget.model_dump(), batch_size, seed]
    kept = ResumableResults(partial, {"texts": texts, "limits": limits, "eigencache": version("eigencache"), **loading})
    running: dict[str, Any] = {"batch_size": batch_size, "seed": seed, "memory": memory, "on_progress": on_progress}
    for model in models:
        with opened(model, **loading, **running) as session:
            session = session.named(session.loaded.name) if len(models) > 1 else session
            which = [str(model), session.loaded.sha256]
            found = next((line for line in kept.done if line["model"] == which), None)
            if found is None:
                sequences = packed(session, source, tokens, max_length or session.loaded.default_length)
                gathered = gather(session, sequences, settings.scopes)
                found = {"model": which, "probe": probe_gathered(session, gathered, settings).model_dump(mode="json")}
                if scored:
                    length = sequences.corpus.max_length
                    recipe = recipe_of(session, text, source.name, tokens, length, **loading)
                    verdict = _judged(session, gathered, scored, held_out_tokens, budget, recipe)
                    found["verdict"] = verdict.model_dump(mode="json")
                kept.add(found)
            else:
                session.on_progress("kept by an interrupted report", 1, 1)
        record.probes.append(ProbeRecord.model_validate(found["probe"]))
        record.verdicts += [Verdict.model_validate(found["verdict"])] if scored else []
    return record


def _judged(session: Session, gathered: Any, scored: Text, tokens: int, budget: Budget, recipe: Recipe) -> Verdict:
    """Return advice, or the reason why this model or text allows none: the probe is worth its report without it."""
    try:
        max_length = gathered.sequences.corpus.max_length
        held_out = pack(scored, session.loaded.tokenizer, tokens=tokens, max_length=max_length)
        return Verdict(advice=judge(session, gathered, held_out, budget, recipe))
    except EigencacheError as error:
        return Verdict(reason=str(error))
