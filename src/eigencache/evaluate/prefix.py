"""Compute the cache of a prefix once, and make compressed or uncompressed caches from the same tensors.

All tokens after the prefix, the first one included, see it only through such a cache.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from eigencache.codec.base import CacheMaker, Compressor, storage_bytes
from eigencache.errors import CodecError, ModelError, NonFiniteError, UnsupportedArchitectureError
from eigencache.models.caches.measuring_cache import MeasuringCache, plain_cache
from eigencache.models.load import LoadedModel
from eigencache.models.tapped_cache import tapped_cache

_KEYS_AND_VALUES = ("DynamicLayer", "DynamicSlidingWindowLayer")


@dataclass(frozen=True)
class Window:
    """Recent tokens that stay uncompressed, and the encoding block size.

    Args:
        tokens: Most recent tokens that stay uncompressed.
        block: Fewest older tokens that are encoded together.
    """

    tokens: int = 0
    block: int = 1


WHOLE = Window()


@dataclass(frozen=True, eq=False)
class Prefix:
    """Tokens and their uncompressed cache.

    Args:
        loaded: Model that read the tokens.
        ids: Token ids [batch, seq].
        stored: Keys and values by layer, each [batch, heads, seq, dim].
    """

    loaded: LoadedModel
    ids: Tensor
    stored: dict[int, tuple[Tensor, Tensor]]

    def first(self, tokens: int) -> "Prefix":
        """Return the first `tokens` tokens of the prefix as a prefix."""
        if tokens == self.ids.shape[1]:
            return self
        stored = {i: (keys[:, :, :tokens], values[:, :, :tokens]) for i, (keys, values) in self.stored.items()}
        return Prefix(self.loaded, self.ids[:, :tokens], stored)

    def cache(self, codec: Compressor | None, window: Window = WHOLE) -> Any:
        """Return a new cache of the prefix.

        Args:
            codec: Codec of a `MeasuringCache`, a `CacheMaker`, or None for an ordinary cache.
            window: Most recent tokens that stay uncompressed, and the encoding block size.

        Raises:
            CodecError: `codec` is a `CacheMaker` and a window is given.
        """
        if codec is None:
            return plain_cache(self.loaded.model, self.stored)
        if isinstance(codec, CacheMaker):
            if window != WHOLE:
                raise CodecError(f"`window`: {codec.name} makes its own cache and does not support a window. Omit it.")
            return codec.cache_of(self)
        cache = MeasuringCache(self.loaded.model, codec, window=window.tokens, block=window.block)
        for layer_idx, (keys, values) in self.stored.items():
            cache.update(keys, values, layer_idx)
        return cache

    def logits(self, ids: Tensor, codec: Compressor | None, window: Window = WHOLE) -> Tensor:
        """Return the logits of tokens after the prefix, read with a new cache.

        Args:
            ids: Token ids [batch, seq].
            codec: As in `cache`.
            window: As in `cache`.
        """
        return read(self.loaded, ids, self.cache(codec, window))


def read_prefix(loaded: LoadedModel, ids: Tensor) -> Prefix:
    """Read tokens once without compression.

    Args:
        loaded: Model.
        ids: Token ids [batch, seq]; seq may be 0.

    Raises:
        UnsupportedArchitectureError: Layers cache states, or more than keys and values per token. Such models do not
            read a text in pieces exactly as they read it whole.
    """
    cache, stored = tapped_cache(loaded.model)
    for layer_idx, layer in enumerate(cache.layers):
        if type(layer).__name__ not in _KEYS_AND_VALUES:
            raise UnsupportedArchitectureError(
                f"{loaded.name}: layer {layer_idx} keeps a {type(layer).__name__}, not keys and values. "
                "The loss of a compressed cache cannot be measured for this model."
            )
    if ids.shape[1]:
        loaded.model.base_model(input_ids=ids, past_key_values=cache, use_cache=True)
    return Prefix(loaded, ids, stored)


class KeptPrefixes:
    """Reads prefixes, and keeps those that fit into a number of bytes, so that they are read once for many codecs."""

    def __init__(self, nbytes: int) -> None:
        self._left, self._kept = nbytes, dict[bytes, Prefix]()

    def __call__(self, loaded: LoadedModel, ids: Tensor) -> Prefix:
        """Return what `read_prefix` returns, which has the errors, too. One object serves one model."""
        key = ids.cpu().numpy().tobytes() + repr(ids.shape).encode()
        if key in self._kept:
            return self._kept[key]
        prefix = read_prefix(loaded, ids)
        nbytes = storage_bytes(x for both in prefix.stored.values() for x in both)
        if nbytes <= self._left:
            self._left -= nbytes
            self._kept[key] = prefix
        return prefix


def read(loaded: LoadedModel, ids: Tensor, cache: Any, codec: str = "a codec") -> Tensor:
    """Read tokens with a cache and return their logits; the cache then contains them.

    Args:
        loaded: Model.
        ids: Token ids [batch, seq].
        cache: Cache of the tokens before.
        codec: Name of its codec, for errors.

    Raises:
        NonFiniteError: Logits hold NaN or infinite values.
    """
    logits = loaded.model(input_ids=ids, past_key_values=cache, use_cache=True).logits
    require_finite(logits, codec)
    return logits


def require_finite(logits: Tensor, codec: str = "a codec") -> None:
    """Raise `NonFiniteError` if logits hold NaN or infinite values; the error names `codec`."""
    if not torch.stack(torch.aminmax(logits)).isfinite().all():
        raise NonFiniteError(
            f"logits with the cache of {codec} hold NaN or infinite values. Use a wider `dtype` or another codec."
        )


def check_positions(loaded: LoadedModel, tokens: int) -> None:
    """Raise `ModelError` if a model with learned positions has fewer than `tokens` positions."""
    positions = loaded.learned_positions
    if positions and tokens > positions:
        raise ModelError(f"{loaded.name} has {positions} positions, but {tokens} tokens are needed. Use shorter contexts.")
