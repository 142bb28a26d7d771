"""`CacheCodec`: a fitted codec of one model, which encodes a cache into bytes and decodes bytes into a cache."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from eigencache.api.opening import evaluating
from eigencache.codec.base import EncodedBytes
from eigencache.codec.eigen.codec import EigenCodec
from eigencache.codec.eigen.container import Reader
from eigencache.codec.live.codec import LiveCodec
from eigencache.codec.saved.folder import LIVE, copy_codec, load_codec, load_live, save_codec
from eigencache.errors import CodecError
from eigencache.fitting.fit import FitResult
from eigencache.inputs import model_of
from eigencache.models.caches.tensors import cache_holding, cached_of, first_slot, padding_of, position_at, without_padding
from eigencache.models.codec_check import check_belongs, codec_for
from eigencache.models.identity import known_fingerprint
from eigencache.models.load import LoadedModel
from eigencache.models.rope_detection import steady_tokens
from eigencache.modes import own_modes

if TYPE_CHECKING:
    from transformers import DynamicCache, PreTrainedModel

_CLEARLY = 1.2  # times the bytes at a wrong position: at the right one a block of text costs a sixth
_FEW = 16  # coded tokens, below which an average says little
# Times the bits of the fit. SmolLM2 at 0.5 bits, fitted on English: Python costs 1.9, Chinese 2.1 and one repeated word 2.4
# times as many, English whose positions are 3 to 300 off 3.6 to 5.6 (`LOG.md`, 2026-11-28).
_FAR = 3


@dataclass(frozen=True, eq=False)
class CacheCodec:
    """A fitted codec of one model: `encode` makes bytes of a cache, `decode` a cache of bytes, or of a part of them."""

    loaded: LoadedModel
    codec: EigenCodec | None  # None: only the live codec was fitted
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
                stand at learned positions or with a rotation that the fit did not see, or cost over three times the bits of
                the fitted text, of which fewer than 16 tokens say too little.
        """
        self.require_model(self.loaded.model)
        with own_modes(), torch.no_grad():
            return self._encode(cache, attention_mask, position_ids, force)

    @property
    def _stored(self) -> EigenCodec:
        if self.codec is None:
            raise CodecError("only the live codec was fitted, which makes no bytes: fit with `stored` to encode caches")
        return self.codec

    def _encode(self, cache: Any, attention_mask: Any, position_ids: Any, force: bool) -> bytes:
        codec, cached = self._stored, cached_of(cache)
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
            starts = self._within_reach(codec, starts, slots - first)
        cached = without_padding(cache, cached, padding)
        blob, *others = sorted((codec.encode(cached, start).rows[0] for start in starts), key=len)
        if others and len(others[0]) < _CLEARLY * len(blob):
            raise CodecError(
                f"{slots - padding} tokens behind padding do not show at which position they begin: "
                "give `position_ids` as the model was given them"
            )
        tokens, bits = codec.cost(blob)
        if not force and self.coded_bits and tokens >= _FEW and bits > _FAR * self.coded_bits:
            raise CodecError(
                f"a token costs {bits:,.0f} bits, {bits / self.coded_bits:.1f} times what the codec was fitted to: this is "
                "not the cache of a text that this model read from position 0 on. Give `attention_mask` if it begins with "
                "padding, `position_ids` if it begins elsewhere; a rotation that changed needs a codec of its own. "
                "Pass `force` to encode it anyway"
            )
        return blob

    def _within_reach(self, codec: EigenCodec, starts: set[int], tokens: int) -> set[int]:
        """The starts from which tokens stand where the codec was fitted. Raises `CodecError` without any."""
        learned, steady = codec.positions, steady_tokens(self.loaded.model.config)
        reach = steady if learned is None else len(learned.places)
        if reach is None or (within := {start for start in starts if start + tokens <= reach}):
            return starts if reach is None else within
        stop = min(starts) + tokens
        raise CodecError(
            f"a text of {stop} tokens: in more than {reach} the model rotates keys with frequencies that this codec does "
            "not know, and it would lose much: keep such a cache uncompressed, or pass `force` to encode it anyway"
            if learned is None
            else f"{tokens} tokens from position {min(starts)} on: the model's learned positions were seen below {reach} in "
            f"the fit: fit the codec with `max_length` {stop} at least; or pass `force` to encode it anyway"
        )

    def decode(self, blob: bytes, tokens: slice = slice(None)) -> DynamicCache:
        """A `DynamicCache` of the container's tokens, or of a stretch of them, whose keys stand at their positions.

        Only the blocks that are needed are read. Of a stretch that begins later, the tokens before it count as read and are
        not attended to, so that `generate` and the model go on at the right positions. Raises the container's errors for
        damage and for another codec's bytes, and `CodecError` for a stretch that layers with a window cannot go on from.
        """
        codec, encoded = self._container(blob, tokens)
        with own_modes(), torch.no_grad():
            cached = codec.decode(encoded, tokens)
            span = range(encoded.tokens)[tokens]
            return cache_holding(self.loaded.model, cached, encoded.start + span.start, len(span))

    def decode_layers(self, blob: bytes, tokens: slice = slice(None)) -> Iterator[tuple[int, tuple[Tensor, Tensor]]]:
        """Yield layer index, keys and values [1, heads, tokens, dim] of what `decode` returns, as soon as they are decoded.

        Who fills a cache of their own can run the first layers of the model while the others are still being decoded.
        Raises what `decode` raises, for a damaged block before the first layer.
        """
        codec, encoded = self._container(blob, tokens)
        layers = codec.decode_layers(encoded, tokens)
        return iter(lambda: self._next(layers), None)  # type: ignore[arg-type, return-value]

    @staticmethod
    def _next(layers: Iterator[Any]) -> Any:
        with own_modes(), torch.no_grad():
            return next(layers, None)

    def _container(self, blob: bytes, tokens: slice) -> tuple[EigenCodec, EncodedBytes]:
        """The stored codec and a container of which `tokens` are wanted."""
        self.require_model(self.loaded.model)
        if not isinstance(blob, bytes | bytearray | memoryview):
            raise CodecError(f"a {type(blob).__name__} is no container: give the bytes, of a file Path(…).read_bytes()")
        codec, header = self._stored, Reader(blob).header
        if header.start and isinstance(tokens, slice) and max(tokens.start or 0, tokens.stop or 0) > header.tokens:
            raise CodecError(
                f"tokens {tokens.start or 0} to {'the end' if tokens.stop is None else tokens.stop}: every layer has a "
                f"window, so that {header.tokens} tokens from position {header.start} on are there: count from their first"
            )
        return codec, EncodedBytes((bytes(blob),), header.start, header.tokens)

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
        if self.fitted.codec is not None and self.fitted.fitting is not None:
            save_codec(folder, self.fitted.codec, *self.fitted.fitting, live=live)
        elif live is not None:
            save_codec(folder, *live)  # type: ignore[arg-type]

    @classmethod
    def load(cls, folder: str | Path, model: str | PreTrainedModel, tokenizer: Any = None) -> CacheCodec:
        """The codec in a folder, for the model it was fitted on. Raises `CodecError` for another model or dtype."""
        with own_modes(), evaluating(model):
            return cls._load(folder, model, tokenizer)

    @classmethod
    def _load(cls, folder: str | Path, model: str | PreTrainedModel, tokenizer: Any) -> CacheCodec:
        saved, loaded = load_codec(folder), model_of(model, tokenizer)
        codec = codec_for(saved, loaded)
        identity = loaded.sha256
        if isinstance(codec, LiveCodec):
            return cls(loaded, None, None, codec, identity, Path(folder))
        if not isinstance(codec, EigenCodec):
            raise CodecError(f"{folder}: holds a codec that makes no bytes: fit one with `eigencache fit`")
        if not (Path(folder) / LIVE).exists():
            return cls(loaded, codec, None, None, identity, Path(folder), saved.coded_bits)
        live = load_live(folder)
        check_belongs(live, loaded)
        return cls(loaded, codec, None, live.codec, identity, Path(folder), saved.coded_bits)  # type: ignore[arg-type]
