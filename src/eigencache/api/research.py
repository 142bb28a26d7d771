"""Questions of research: `adapter` (residual adapters as operators), `mla` (latents), `fold` (attention on coefficients)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from eigencache.api.opening import CALIBRATION_LENGTH, HELD_OUT_TEXT, TEXT, TOKENS, opened, packed
from eigencache.fitting.pca import PCACalibration
from eigencache.fitting.pca_settings import PCASettings, Target
from eigencache.inputs import check_names, text_of
from eigencache.records.adapter import AdapterRecord
from eigencache.records.base import Scope
from eigencache.records.folding import FoldingResult
from eigencache.records.mla import LatentComparison
from eigencache.records.quality import ReadingProtocol, SweepRecord
from eigencache.studies.adapters.study import study_adapter
from eigencache.studies.adapters.training import TrainingSettings
from eigencache.studies.folding import measure_folding
from eigencache.studies.mla import check_latent, compare_caches, fit_expanded, sweep_expanded
from eigencache.studies.sweep import Plan, sweep_model

if TYPE_CHECKING:
    from eigencache.api.opening import Model, TextLike, Tokenizer

_SHARES = tuple(eighth / 8 for eighth in range(1, 9))


def adapter(
    model: Model,
    tokenizer: Tokenizer = None,
    text: TextLike = HELD_OUT_TEXT,
    calibration_text: TextLike = TEXT,
    *,
    target: Literal["v", "k"] = "v",
    layers: Sequence[int] | None = None,
    ranks: tuple[int | None, ...] | None = None,
    training: TrainingSettings | None = None,
    tokens: int = 16_384,
    calibration_tokens: int = 65_536,
    max_length: int = 512,
    prefix: int | None = None,
    chunk: int | None = None,
    force: bool = False,
    **options: Any,
) -> AdapterRecord:
    """Train residual adapters, analyze them as operators, and compare the loss of their truncation with direct PCA.

    Args:
        model: a name or folder, or a loaded model, which needs its `tokenizer`.
        tokenizer: a tokenizer, or the name of one.
        text: the held-out text that is scored.
        calibration_text: the text that adapters are trained on and bases are fitted on.
        target: values, or keys before rotation.
        layers: layers to adapt. Default: all.
        ranks: ranks to truncate to. Default: quarters of the width.
        training: loss, inner rank, steps and learning rate, and the batch size and the seed of the whole study.
        tokens: tokens of `text` at most.
        calibration_tokens: tokens of `calibration_text` at most.
        max_length: tokens per sequence.
        prefix: tokens held compressed. Default: half of a sequence.
        chunk: tokens read at a time, all older ones held compressed; replaces `prefix`.
        force: score a text that overlaps the calibration text as well.
        **options: device, dtype, memory and on_progress, as for `probe`; batch_size and seed have no effect, because those
            of `training` replace them.

    Returns:
        The record: loss before and after training, every operator, and the loss of every truncation.

    Raises:
        EigencacheError: one of `eigencache.errors`, such as `TrainingError` for a setting that is out of range.
    """
    source, calibration_source = text_of(text), text_of(calibration_text)
    with opened(model, tokenizer, **options) as session:
        held_out = packed(session, source, tokens, max_length)
        calibration = packed(session, calibration_source, calibration_tokens, max_length)
        return study_adapter(
            session,
            held_out,
            calibration,
            ReadingProtocol(kind="chunked" if chunk else "prefix", length=chunk or prefix or max_length // 2),
            target=target,
            layers=layers and tuple(layers),
            ranks=ranks,
            training=training or TrainingSettings(),
            force=force,
        )


class MLAResult(NamedTuple):
    """What `mla` measured: the sweep of the latent and its expansion, both caches, and the sweep of the other model."""

    sweep: SweepRecord
    caches: LatentComparison
    against: SweepRecord | None


def mla(
    model: Model = "ref-deepseek",
    tokenizer: Tokenizer = None,
    text: TextLike = HELD_OUT_TEXT,
    calibration_text: TextLike = TEXT,
    *,
    against: str | None = None,
    scope: Scope = "head",
    tokens: int = 32_768,
    calibration_tokens: int = TOKENS,
    max_length: int = 1024,
    force: bool = False,
    **options: Any,
) -> MLAResult:
    """Measure multi-head latent attention (MLA).

    The bytes and logits of the latent and of the expanded cache are compared, and the loss of low-rank latents, keys and
    values is measured.

    Args:
        model: an MLA model: a name or folder, or a loaded model, which needs its `tokenizer`.
        tokenizer: a tokenizer, or the name of one.
        text: the held-out text that is scored.
        calibration_text: the text that bases are fitted on.
        against: a model with keys and values, to compare at equal bytes.
        scope: one basis per head, per layer or for all layers.
        tokens: tokens of `text` at most.
        calibration_tokens: tokens of `calibration_text` at most.
        max_length: tokens per sequence; half of it is held compressed.
        force: score a text that overlaps the calibration text as well.
        **options: device, dtype, batch_size, seed, memory and on_progress, as for `probe`.

    Returns:
        The sweep of the latent, keys and values, the comparison of both caches, and the sweep of `against`.

    Raises:
        UnsupportedArchitectureError: the model caches no latent.
        ModelError: `model` or `against` does not exist.
        CorpusError: `text` overlaps the calibration text and `force` is false.
    """
    check_names([model, against])
    source, calibration_source = text_of(text), text_of(calibration_text)
    protocol = ReadingProtocol(kind="prefix", length=max_length // 2)

    def swept(session: Any, settings: Sequence[PCASettings]) -> tuple[SweepRecord, Any, Any]:
        held_out = packed(session, source, tokens, max_length)
        fitted_on = packed(session, calibration_source, calibration_tokens, min(CALIBRATION_LENGTH, max_length))
        calibration = PCACalibration(session, fitted_on, scopes=(scope,))
        plans = [Plan(one, shares=_SHARES) for one in settings]
        return sweep_model(session, held_out, calibration, plans, protocol, force=force), held_out, fitted_on

    with opened(model, tokenizer, **options) as session:
        check_latent(session.loaded)
        latent = [PCASettings("latent", scope, metric=metric) for metric in ("frobenius", "attention", "fisher")]
        record, held_out, fitted_on = swept(session, [*latent, PCASettings("key_rope", scope, metric="fisher")])
        caches = compare_caches(session.loaded, held_out, protocol.length)
        fitted = fit_expanded(session, fitted_on)
        for target in ("k", "v"):
            record.series.append(sweep_expanded(session, held_out, fitted, target, _SHARES, protocol.length))
    if against is None:
        return MLAResult(record, caches, None)
    with opened(against, **options) as session:
        return MLAResult(record, caches, swept(session, [PCASettings("kv", scope, metric="fisher")])[0])


def fold(
    model: Model,
    tokenizer: Tokenizer = None,
    text: TextLike = HELD_OUT_TEXT,
    calibration_text: TextLike = TEXT,
    *,
    rank: int | None = None,
    tokens: int = 2048,
    calibration_tokens: int = 32_768,
    **options: Any,
) -> list[FoldingResult]:
    """Compare the logits of attention on coefficients with those of decoding first, for every tensor that a model caches.

    Args:
        model: a name or folder, or a loaded model, which needs its `tokenizer`.
        tokenizer: a tokenizer, or the name of one.
        text: the text that is compared on.
        calibration_text: the text that bases are fitted on.
        rank: coefficients per head. Default: half of its width.
        tokens: tokens of `text` at most.
        calibration_tokens: tokens of `calibration_text` at most.
        **options: device, dtype, batch_size, seed, memory and on_progress, as for `probe`.

    Returns:
        For every tensor, the largest differences of logits, and the bytes of both caches.

    Raises:
        EigencacheError: one of `eigencache.errors`.
    """
    source, calibration_source = text_of(text), text_of(calibration_text)
    with opened(model, tokenizer, **options) as session:
        held_out = packed(session, source, tokens, session.loaded.default_length)
        fitted_on = packed(session, calibration_source, calibration_tokens, held_out.corpus.max_length)
        calibration = PCACalibration(session, fitted_on)
        targets: tuple[Target, ...] = ("latent",) if session.loaded.geometry.mla else ("v", "k", "kv")
        results = []
        for done, target in enumerate(targets, 1):
            full = calibration.fit(PCASettings(target, frame="post"))
            width = full.groups[0].transform.rank
            kept = rank or max(1, width // 2)
            codec = full.truncated(kept, name=f"{target}, rank {kept} of {width}")
            results.append(measure_folding(session.loaded, held_out, codec))
            session.on_progress("comparing logits", done, len(targets))
        return results
