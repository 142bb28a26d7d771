"""`fit`: from a model and a text to a codec of its cache."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from eigencache.api.codec import CacheCodec
from eigencache.api.opening import TEXT, TOKENS, opened, packed
from eigencache.calibration.calibration_set import calibration_length
from eigencache.corpora.text import Text
from eigencache.errors import BudgetError, ModelError
from eigencache.fitting.eigen import EigenSettings
from eigencache.fitting.fit import Goal, LiveGoal, fit_codec, fit_live_codec
from eigencache.fitting.heldout_score import CONTEXT
from eigencache.inputs import text_of
from eigencache.models.caches.keyword import innermost
from eigencache.models.load import LoadedModel
from eigencache.progress import Progress, silent

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def fit(
    model: str | PreTrainedModel,
    tokenizer: str | PreTrainedTokenizerBase | None = None,
    text: str | Iterable[str] | Text = TEXT,
    *,
    bits: float | None = None,
    ratio: float | None = None,
    max_nll: float | None = None,
    tokens: int | None = TOKENS,
    max_length: int | None = None,
    context: int = CONTEXT,
    settings: EigenSettings | None = None,
    stored: bool = True,
    live: bool | LiveGoal = False,
    device: str | None = None,
    dtype: str | None = None,
    batch_size: int = 8,
    seed: int = 0,
    memory: int | None = None,
    on_progress: Progress = silent,
    partial: Path | None = None,
) -> CacheCodec:
    """Fit codecs to the cache of a model: `eigen`, which stores caches as bytes, the codec of `CompressedCache`, or both.

    Without `bits`, `ratio` and `max_nll` the smallest codec whose ΔNLL and KL are at most 0.01 nats per token is fitted.

    Args:
        model: a name or folder, or a loaded model, which needs its `tokenizer`.
        tokenizer: a tokenizer, or the name of one.
        text: the calibration text, as for `probe`.
        bits: bits per value of `eigen` at `context` tokens, without side information.
        ratio: 16 over those bits.
        max_nll: nats per token that ΔNLL and KL on held-out text may reach.
        tokens: tokens of the text at most; None for all.
        max_length: tokens per sequence. Default: 512, or all positions that a model has learned.
        context: context length, in tokens, at which `bits` and `ratio` are evaluated.
        settings: settings of `eigen`.
        stored: fit `eigen`.
        live: fit the live codec, for `max_nll` or as the goal says.
        device: device to load a model to.
        dtype: number format to load a model in.
        batch_size: sequences per forward pass.
        seed: recorded with the codec.
        memory: bytes that the fit may take beside the model; None for 60 % of what is free.
        on_progress: called with the name of the work, the units done and the units in all.
        partial: folder that metric and vectors are kept in, so that an interrupted fit can be resumed; yours to delete. It
            takes about 2 bytes per cached number and sampled token.

    Raises:
        EigencacheError: one of `eigencache.errors`, such as `BudgetError` for a goal that cannot be reached.
    """
    goal = Goal.of(bits, ratio, max_nll)
    wanted = live if isinstance(live, LiveGoal) else LiveGoal(max_nll=max_nll) if live else None
    if not stored:
        if wanted is None:
            raise BudgetError("`stored` is False and `live` is False: no codec is left to fit. Set one of them.")
        if bits is not None or ratio is not None:
            given = "bits" if bits is not None else "ratio"
            raise BudgetError(f"`{given}` is a goal of the stored codec, which `stored` leaves out. Use `live` with a goal.")
        if settings is not None:
            raise BudgetError("`settings` belong to the stored codec, which `stored` leaves out. Use LiveGoal(settings=…).")
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
        loaded = session.loaded
        _require_language_model(loaded)
        identity = loaded.sha256  # before the work: a model that changes meanwhile is noticed
        sequences = packed(session, source, tokens, max_length or calibration_length(loaded))
        if stored:
            chosen = settings or EigenSettings()
            fitted = fit_codec(session, sequences, chosen, goal, context=context, live=wanted, partial=partial)
        else:
            assert wanted is not None
            fitted = fit_live_codec(session, sequences, wanted, context=context, partial=partial)
        codec = fitted.codec and fitted.codec.to(loaded.device)
        coded_bits = fitted.expected.coded_bits if fitted.expected else None
        live_codec = fitted.live and fitted.live.codec
        return CacheCodec(loaded, codec, fitted, live_codec, identity, coded_bits=coded_bits)


def _require_language_model(loaded: LoadedModel) -> None:
    innermost(loaded.model)  # refuses prefix tuning
    if not loaded.model.can_generate():
        kind = type(loaded.model).__name__
        raise ModelError(f"`model` is a {kind}, which predicts no tokens: load it with AutoModelForCausalLM")
