"""`CacheCodec`: the fitted codecs of one model, which encode a cache as bytes and decode the bytes into a cache."""

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
    """The fitted codecs of one model. `fit` and `load` make one.

    `encode` turns a cache into bytes, a container. `decode` turns a container, or a part of it, into a cache.

    Attributes:
        loaded: the model, its tokenizer and its geometry.
        codec: the stored codec `eigen`; None if only the live codec was fitted.
        fitted: the result of the fit; None for a codec that was loaded.
        live: the live codec, for `CompressedCache`; None if it was not fitted.
        identity: fingerprint of the model at the fit (`models.identity`); None: the model is not checked.
        folder: the folder that the codec was loaded from; None for a codec that was fitted.
        coded_bits: expected bits of a coded token; None: the cost is not checked.
    """

    loaded: LoadedModel
    codec: EigenCodec | None
    fitted: FitResult | None = None
    live: LiveCodec | None = None
    identity: str | None = None
    folder: Path | None = None
    coded_bits: float | None = None

    def require_model(self, model: Any) -> None:
        """Check that a model is the one that the codec was fitted on, and unchanged since.

        Weights are hashed again only after one was written, or an adapter was added or switched.

        Args:
            model: the transformers model that uses the codec.

        Raises:
            CodecError: it is another model, or it has changed.
        """
        if self.identity is not None and known_fingerprint(model) != self.identity:
            raise CodecError(
                f"the model is not the one that this codec was fitted on: other weights, another configuration, or an "
                f"adapter that was added, switched or merged since: restore {self.loaded.name}, or fit a codec on this one"
            )

    def encode(self, cache: Any, attention_mask: Any = None, position_ids: Any = None, *, force: bool = False) -> bytes:
        """Encode a cache as bytes.

        Args:
            cache: the `past_key_values` of a model's output for one sequence: a dynamic cache of transformers with keys and
                values [1, heads, tokens, dim] per layer, in the dtype of the model. It is not changed.
            attention_mask: the mask [1, tokens] that the model was given. It is required for a sequence with left padding,
                because a cache does not show which slots are padding. The padding is not encoded.
            position_ids: the positions [1, tokens] that the model was given. Default: counted from 0. With padding they are
                counted from the first slot or from the first token, whichever the keys show.
            force: encode the cache although its tokens cost too many bits, or lie at positions that the fit did not cover.

        Returns:
            The container, one per sequence (docs/format.md). The same cache gives the same bytes.

        Raises:
            CodecError: The model has changed since the fit, or there is no stored codec. The cache has several rows, is of
                another kind or is not finite. `attention_mask` or `position_ids` does not match it. Without `force`, also:
                tokens lie at positions that the fit did not cover, or 16 or more coded tokens cost over three times the
                bits expected from the fit.
        """
        self.require_model(self.loaded.model)
        with own_modes(), torch.no_grad():
            return self._encode(cache, attention_mask, position_ids, force)

    @property
    def _stored(self) -> EigenCodec:
        if self.codec is None:
            raise CodecError("only the live codec was fitted, which writes no bytes: fit with `stored` to encode caches")
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
        """Return the start positions from which the fit covers all tokens. Raises `CodecError` if there are none."""
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
        """Decode a container, or a part of it, into a cache.

        Only the blocks that hold the tokens are decoded. If `tokens` does not begin with the first token, the earlier tokens
        count as read but are not attended to, so that `generate` and the model continue at the right position.

        Args:
            blob: the container, as `encode` returned it.
            tokens: a contiguous slice of its tokens, counted from the first that it holds. Default: all.

        Returns:
            A cache with keys and values [1, heads, tokens, dim] per layer, in the dtype and on the device of the model. Keys
            keep their positions. A layer with a sliding window holds its last tokens only.

        Raises:
            ContainerError: the bytes are damaged, are no container (`NotAContainerError`), or were written by another codec
                (`ForeignContainerError`).
            CodecError: the model has changed since the fit, there is no stored codec, `tokens` is no contiguous slice, or a
                layer with a sliding window lacks tokens that the next token attends to.
        """
        codec, encoded = self._container(blob, tokens)
        with own_modes(), torch.no_grad():
            cached = codec.decode(encoded, tokens)
            span = range(encoded.tokens)[tokens]
            return cache_holding(self.loaded.model, cached, encoded.start + span.start, len(span))

    def decode_layers(self, blob: bytes, tokens: slice = slice(None)) -> Iterator[tuple[int, tuple[Tensor, Tensor]]]:
        """Decode a container layer by layer.

        A caller with a cache of its own can run the first layers of the model while the others are still being decoded.

        Args:
            blob: the container, as `encode` returned it.
            tokens: a contiguous slice of its tokens, counted from the first that it holds. Default: all.

        Yields:
            Layer index, and keys and values [1, heads, tokens, dim] in the dtype and on the device of the model, as soon as
            they are decoded.

        Raises:
            CodecError: as for `decode`, but windows are not checked. A damaged block is reported before the first layer.
        """
        codec, encoded = self._container(blob, tokens)
        layers = codec.decode_layers(encoded, tokens)
        return iter(lambda: self._next(layers), None)  # type: ignore[arg-type, return-value]

    @staticmethod
    def _next(layers: Iterator[Any]) -> Any:
        with own_modes(), torch.no_grad():
            return next(layers, None)

    def _container(self, blob: bytes, tokens: slice) -> tuple[EigenCodec, EncodedBytes]:
        """Return the stored codec and a container, after checking the model and the range of `tokens`."""
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
        """Save the codecs as a folder, with the stored and the live codec in one step; all files are written or none.

        Args:
            folder: the folder. A codec in it is replaced. A loaded codec is copied from the folder that it was loaded from.

        Raises:
            OutputError: the folder holds other files, or cannot be written.
            CodecError: the codec was neither fitted nor loaded.
        """
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
    def load(
        cls,
        folder: str | Path,
        model: str | PreTrainedModel,
        tokenizer: Any = None,
        *,
        device: str | None = None,
        dtype: str | None = None,
    ) -> CacheCodec:
        """Load the codecs of a folder for the model that they were fitted on.

        Args:
            folder: the folder that `save` or `eigencache fit` wrote. It is read before the model is loaded.
            model: a name or folder, or a loaded model, which needs its `tokenizer`.
            tokenizer: a tokenizer, or the name of one.
            device: device to load a named model to. Default: `cuda` if available, otherwise `cpu`.
            dtype: number format to load a named model in, which must be that of the fit. Default: `float32` on a CPU,
                otherwise that of the checkpoint.

        Returns:
            The codecs; `loaded` is the model.

        Raises:
            CodecError: the folder is damaged or has no codec, or its codec was fitted on another model or in another dtype.
            ModelError: the model cannot be loaded.
        """
        with own_modes(), evaluating(model):
            return cls._load(Path(folder), model, tokenizer, device, dtype)

    @classmethod
    def _load(cls, folder: Path, model: Any, tokenizer: Any, device: str | None, dtype: str | None) -> CacheCodec:
        saved = load_codec(folder)
        if not isinstance(saved.codec, EigenCodec | LiveCodec):
            raise CodecError(f"{folder}: holds a codec that writes no bytes: fit one with `eigencache fit`")
        live = load_live(folder) if isinstance(saved.codec, EigenCodec) and (folder / LIVE).exists() else None
        loaded = model_of(model, tokenizer, device=device, dtype=dtype)
        codec, identity = codec_for(saved, loaded), loaded.sha256
        if isinstance(codec, LiveCodec):
            return cls(loaded, None, None, codec, identity, folder)
        if live is not None:
            check_belongs(live, loaded)
        return cls(loaded, codec, None, live and live.codec, identity, folder, saved.coded_bits)  # type: ignore[arg-type]
