"""The public Python API: `probe` gives statistics as attributes, `fit` a codec that turns caches into bytes and back."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from eigencache.calibration.calibration_set import calibration_length
from eigencache.calibration.moments import Progress, silent
from eigencache.codec.base import EncodedBytes
from eigencache.codec.eigen.codec import EigenCodec
from eigencache.codec.eigen.container import Reader
from eigencache.codec.live.codec import LiveCodec
from eigencache.codec.saved.folder import LIVE, copy_codec, load_codec, load_live, save_codec
from eigencache.corpora.sequences import pack
from eigencache.errors import CodecError, LayerError, ModelError
from eigencache.fitting.eigen import EigenSettings
from eigencache.fitting.fit import FitResult, Goal, LiveGoal, fit_codec
from eigencache.fitting.heldout_score import CONTEXT
from eigencache.inputs import model_of, text_of
from eigencache.models.caches.keyword import innermost
from eigencache.models.caches.tensors import cache_holding, cached_of, first_slot, padding_of, position_at, without_padding
from eigencache.models.codec_check import check_belongs, codec_for
from eigencache.models.identity import known_fingerprint
from eigencache.models.live_cache.cache import CompressedCache
from eigencache.models.live_cache.context import compressed
from eigencache.models.load import LoadedModel
from eigencache.models.rope_detection import steady_tokens
from eigencache.modes import own_modes
from eigencache.records.probe import ProbeRecord, Spectrum
from eigencache.studies.probe import ProbeSettings, probe_model

__all__ = ["CacheCodec", "CompressedCache", "Probe", "compressed", "fit", "probe"]

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure
    from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

DEFAULT_TEXT = "stdlib"
DEFAULT_TOKENS = 131_072
_CLEARLY = 1.2  # times the bytes at a wrong position: at the right one a block of text costs a sixth
_FEW = 16  # coded tokens, below which an average says little
_FAR = 4  # times the bits of the fit: other languages and random tokens cost 2, padding and wrong positions 8


def probe(
    model: str | PreTrainedModel,
    tokenizer: str | PreTrainedTokenizerBase | None = None,
    text: str | Iterable[str] = DEFAULT_TEXT,
    *,
    tokens: int | None = DEFAULT_TOKENS,
    max_length: int | None = None,
    settings: ProbeSettings | None = None,
    on_progress: Progress | None = None,
) -> Probe:
    """Probe the KV cache of `model` on `text`; the model's weights and hooks are as before afterwards.

    `model`: a name or folder, or a model already loaded in any way `from_pretrained` offers (then `tokenizer` is
    needed). `text`: a spec as on the command line (`stdlib`, a file, `hf:…`), a path, the text itself, or an iterable of
    strings, paths or rows with a field "text".
    `tokens`: how many to use at most, None for all. `max_length`: tokens per sequence, by default 512 or what the
    model has positions for. Raises the errors of `eigencache.errors`.
    """
    with own_modes(), _evaluating(model):
        loaded = model_of(model, tokenizer)
        source = text_of(text)
        sequences = pack(source, loaded.tokenizer, tokens=tokens, max_length=max_length or loaded.default_length)
        extra = {} if on_progress is None else {"on_progress": on_progress}
        return Probe(probe_model(loaded, sequences, settings, **extra))


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    """A model that was in training mode is so again afterwards, each of its modules."""
    training = [module for module in model.modules() if module.training] if isinstance(model, nn.Module) else []
    try:
        yield
    finally:
        for module in training:
            module.training = True


@dataclass(frozen=True)
class LayerView:
    """The spectra of one layer by tensor name: `.values`, `.keys_pre_rope`, `.keys_post_rope`, `.latent`, …

    `.keys` is the frame before rotation where both exist. Centered, heads of the layer concatenated; `head(i)` and
    `uncentered` choose otherwise.
    """

    record: ProbeRecord
    layer_idx: int | None
    head_idx: int | None = None
    centered: bool = True

    def head(self, head: int) -> LayerView:
        """The same of one KV head."""
        return LayerView(self.record, self.layer_idx, head, self.centered)

    @property
    def uncentered(self) -> LayerView:
        """The same about zero instead of about the mean."""
        return LayerView(self.record, self.layer_idx, self.head_idx, False)

    def __getattr__(self, name: str) -> Spectrum:
        if name.startswith("_"):
            raise AttributeError(name)
        scope = "all" if self.layer_idx is None else "layer" if self.head_idx is None else "head"
        for wanted in (name, f"{name}_pre_rope", f"{name}_post_rope"):
            if found := self.record.select(wanted, scope, self.layer_idx, self.head_idx, self.centered):
                return found[0]
        raise AttributeError(f"no {name} at scope {scope}; captured: {', '.join(self.record.names)}")


@dataclass(frozen=True)
class Probe:
    """A finished probe: statistics by layer, plots, tables, JSON. `record` holds everything that was measured."""

    record: ProbeRecord

    def layer(self, layer_idx: int) -> LayerView:
        """One layer's spectra. Raises `LayerError` for a layer that was not probed."""
        probed = sorted({s.layer_idx for s in self.record.spectra if s.layer_idx is not None})
        if layer_idx not in probed:
            raise LayerError(f"layer {layer_idx} was not probed; probed layers: {', '.join(map(str, probed))}")
        return LayerView(self.record, layer_idx)

    @property
    def all_layers(self) -> LayerView:
        """The spectra over all layers concatenated."""
        return LayerView(self.record, None)

    @property
    def warnings(self) -> list[str]:
        """What the data could not support."""
        return self.record.warnings

    def plot(self) -> Figure:
        """Spectra and energy curves as a matplotlib figure."""
        from eigencache.report.probe.plots import plot_probe

        return plot_probe(self.record)

    def to_pandas(self) -> pd.DataFrame:
        """One row per spectrum; eigenvalues and energy curves are left in `record`."""
        from eigencache.report.core.drawing import require

        require("pandas", "data frames")
        import pandas as pd

        left_out = {"eigenvalues", "null_eigenvalues", "energy", "held_out_energy", "intervals", "refusals", "warnings"}
        return pd.DataFrame([spectrum.model_dump(exclude=left_out) for spectrum in self.record.spectra])

    def save(self, path: str | Path) -> None:
        """Write the record as JSON, whole or not at all."""
        self.record.save(path)

    @classmethod
    def load(cls, path: str | Path) -> Probe:
        """Read what `save` or `eigencache probe --output` wrote."""
        return cls(ProbeRecord.load(path))

    def _repr_html_(self) -> str:
        from eigencache.report.probe.tables import probe_table

        return probe_table(self.record).html()


def fit(
    model: str | PreTrainedModel,
    tokenizer: str | PreTrainedTokenizerBase | None = None,
    text: str | Iterable[str] = DEFAULT_TEXT,
    *,
    bits: float | None = None,
    ratio: float | None = None,
    max_nll: float | None = None,
    tokens: int | None = DEFAULT_TOKENS,
    max_length: int | None = None,
    context: int = CONTEXT,
    settings: EigenSettings | None = None,
    live: bool | LiveGoal = False,
    on_progress: Progress = silent,
) -> CacheCodec:
    """Fit the codec `eigen` to the cache of `model` on `text`; model, tokenizer and text as for `probe`.

    `max_length`: tokens of a sequence, by default 512, or all positions that a model has learned.

    One of `bits` (per value of `context` tokens, everything counted), `ratio` (16 over them) and `max_nll` (nats per
    token that may be lost); without any, `max_nll` 0.01. `live`: fit the codec of a live cache as well, for the same
    loss or as the goal says. Raises the errors of `eigencache.errors`.
    """
    with own_modes(), _evaluating(model):
        loaded = model_of(model, tokenizer)
        innermost(loaded.model)  # refuses prefix tuning
        if loaded.model.base_model is loaded.model:
            kind = type(loaded.model).__name__
            raise ModelError(f"`model` is a {kind}, which predicts no tokens: load it with AutoModelForCausalLM")
        identity = loaded.sha256  # before the work: another model is noticed while it goes on
        source = text_of(text)
        sequences = pack(source, loaded.tokenizer, tokens=tokens, max_length=max_length or calibration_length(loaded))
        fitted = fit_codec(
            loaded,
            sequences,
            settings or EigenSettings(),
            Goal.of(bits, ratio, max_nll),
            context=context,
            live=live if isinstance(live, LiveGoal) else LiveGoal(max_nll=max_nll) if live else None,
            on_progress=on_progress,
        )
        live_codec = fitted.live and fitted.live.codec
        codec = fitted.codec.to(loaded.device)
        return CacheCodec(loaded, codec, fitted, live_codec, identity, coded_bits=fitted.expected.coded_bits)


@dataclass(frozen=True, eq=False)
class CacheCodec:
    """A fitted codec of one model: `encode` makes bytes of a cache, `decode` a cache of bytes, or of a part of them."""

    loaded: LoadedModel
    codec: EigenCodec
    fitted: FitResult | None = None  # None: it was loaded
    live: LiveCodec | None = None  # for `CompressedCache`
    identity: str | None = None  # of the model that it was fitted on (models/identity.py); None: not checked
    folder: Path | None = None  # that it was loaded from
    coded_bits: float | None = None  # what a coded token cost on the text of the fit; None: not checked

    def require_model(self, model: Any) -> None:
        """Raises `CodecError` unless `model` is the one that the codec was fitted on, as it was then.

        Cheap while nothing has changed; weights are hashed anew where one was written, or an adapter added or switched.
        """
        if self.identity is not None and known_fingerprint(model) != self.identity:
            raise CodecError(
                f"the model is not the one that this codec was fitted on: other weights, another configuration, or an "
                f"adapter that was added, switched or merged since: restore {self.loaded.name}, or fit a codec on this one"
            )

    def encode(self, cache: Any, attention_mask: Any = None, position_ids: Any = None, *, force: bool = False) -> bytes:
        """Return the container of a cache: what a model gave as `past_key_values` for one row.

        Args:
            cache: a dynamic cache of transformers, batch 1.
            attention_mask: the row's mask [1, tokens] as the model was given it; needed for a row with padding on its left,
                which a cache does not tell from text. The padding is left out.
            position_ids: the row's positions [1, tokens] as the model was given them. Default: from 0 on, or, for a row with
                padding, from 0 at the first slot or at the first token, whichever the keys show.
            force: encode also what costs far more bits than the fitted text, or stands beyond what the fit saw.

        Raises:
            CodecError: the cache has several rows or is of another kind, mask or positions do not fit it, or its tokens
                stand at learned positions or with a rotation that the fit did not see, or cost over four times the bits of
                the fitted text, of which fewer than 16 tokens say too little.
        """
        self.require_model(self.loaded.model)
        with own_modes(), torch.no_grad():
            return self._encode(cache, attention_mask, position_ids, force)

    def _encode(self, cache: Any, attention_mask: Any, position_ids: Any, force: bool) -> bytes:
        cached = cached_of(cache)
        if (rows := len(next(iter(cached.values()))[0])) != 1:
            raise CodecError(
                f"a cache of {rows} rows: encode them one by one, each taken out of a copy: "
                "`row = copy.deepcopy(cache); row.batch_select_indices(torch.tensor([0]))`"
            )
        slots = cache.get_seq_length()
        padding = 0 if attention_mask is None else padding_of(attention_mask, slots)
        first = max(first_slot(cache), padding)
        starts = {first, first - padding} if position_ids is None else {position_at(position_ids, first, slots)}
        if not force:
            starts = self._within_reach(starts, slots - first)
        cached = without_padding(cache, cached, padding)
        blob, *others = sorted((self.codec.encode(cached, start).rows[0] for start in starts), key=len)
        if others and len(others[0]) < _CLEARLY * len(blob):
            raise CodecError(
                f"{slots - padding} tokens behind padding do not show at which position they begin: "
                "give `position_ids` as the model was given them"
            )
        tokens, bits = self.codec.cost(blob)
        if not force and self.coded_bits and tokens >= _FEW and bits > _FAR * self.coded_bits:
            raise CodecError(
                f"a token costs {bits:,.0f} bits, {bits / self.coded_bits:.1f} times what the codec was fitted to: this is "
                "not the cache of a text that this model read from position 0 on. Give `attention_mask` if it begins with "
                "padding, `position_ids` if it begins elsewhere; a rotation that changed needs a codec of its own. "
                "`force` encodes it all the same"
            )
        return blob

    def _within_reach(self, starts: set[int], tokens: int) -> set[int]:
        """The starts from which tokens stand where the codec was fitted. Raises `CodecError` without any."""
        learned, steady = self.codec.positions, steady_tokens(self.loaded.model.config)
        reach = steady if learned is None else len(learned.places)
        if reach is None or (within := {start for start in starts if start + tokens <= reach}):
            return starts if reach is None else within
        stop = min(starts) + tokens
        raise CodecError(
            f"a text of {stop} tokens: in more than {reach} the model rotates keys with frequencies that this codec does "
            "not know, and it would lose much: keep such a cache as it is; `force` encodes it all the same"
            if learned is None
            else f"{tokens} tokens from position {min(starts)} on: the model's learned positions were seen below {reach} in "
            f"the fit: fit the codec with `max_length` {stop} at least; `force` encodes them as they are"
        )

    def decode(self, blob: bytes, tokens: slice = slice(None)) -> DynamicCache:
        """A `DynamicCache` of the container's tokens, or of a stretch of them, whose keys stand at their positions.

        Only the blocks that are needed are read. Of a stretch that begins later, the tokens before it count as read and are
        not attended to, so that `generate` and the model go on at the right positions. Raises the container's errors for
        damage and for another codec's bytes, and `CodecError` for a stretch that layers with a window cannot go on from.
        """
        self.require_model(self.loaded.model)
        if not isinstance(blob, bytes | bytearray | memoryview):
            raise CodecError(f"a {type(blob).__name__} is no container: give the bytes, of a file Path(…).read_bytes()")
        header = Reader(blob).header
        if header.start and isinstance(tokens, slice) and max(tokens.start or 0, tokens.stop or 0) > header.tokens:
            raise CodecError(
                f"tokens {tokens.start or 0} to {'the end' if tokens.stop is None else tokens.stop}: every layer has a "
                f"window, so that {header.tokens} tokens from position {header.start} on are there: count from their first"
            )
        with own_modes(), torch.no_grad():
            cached = self.codec.decode(EncodedBytes((bytes(blob),), header.start, header.tokens), tokens)
            span = range(header.tokens)[tokens]
            return cache_holding(self.loaded.model, cached, header.start + span.start, len(span))

    def save(self, folder: str | Path) -> None:
        """Write the codec into a folder, stored and live part in one step. Raises `OutputError` where that fails."""
        if self.fitted is None:
            if self.folder is None:
                raise CodecError("this codec was neither fitted nor loaded here: save the one that it was made of")
            copy_codec(self.folder, folder)
            return
        live = None
        if self.live is not None and self.fitted.live_fitting is not None:
            live = (self.live, *self.fitted.live_fitting)
        save_codec(folder, self.fitted.codec, *self.fitted.fitting, live=live)

    @classmethod
    def load(cls, folder: str | Path, model: str | PreTrainedModel, tokenizer: Any = None) -> CacheCodec:
        """The codec in a folder, for the model it was fitted on. Raises `CodecError` for another model or dtype."""
        with own_modes(), _evaluating(model):
            return cls._load(folder, model, tokenizer)

    @classmethod
    def _load(cls, folder: str | Path, model: str | PreTrainedModel, tokenizer: Any) -> CacheCodec:
        saved, loaded = load_codec(folder), model_of(model, tokenizer)
        codec = codec_for(saved, loaded)
        identity = loaded.sha256
        if not isinstance(codec, EigenCodec):
            raise CodecError(f"{folder}: holds a codec that makes no bytes: fit one with `eigencache fit`")
        if not (Path(folder) / LIVE).exists():
            return cls(loaded, codec, None, None, identity, Path(folder), saved.coded_bits)
        live = load_live(folder)
        check_belongs(live, loaded)
        return cls(loaded, codec, None, live.codec, identity, Path(folder), saved.coded_bits)  # type: ignore[arg-type]
