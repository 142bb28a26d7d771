"""A prefix is computed once; every cache made of it, encoded or not, starts from the same tensors.

What is read after it sees the prefix through that cache alone, also the first token.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from eigencache.codec.base import CacheMaker, Compressor
from eigencache.errors import CodecError, ModelError, NonFiniteError, UnsupportedArchitectureError
from eigencache.models.caches.measuring_cache import MeasuringCache, plain_cache
from eigencache.models.load import LoadedModel
from eigencache.models.tapped_cache import tapped_cache

_KEYS_AND_VALUES = ("DynamicLayer", "DynamicSlidingWindowLayer")


@dataclass(frozen=True)
class Window:
    """How a cache holds its past: the most recent tokens as they are, what is older encoded in stretches."""

    tokens: int = 0
    block: int = 1  # least tokens that are encoded at a time


WHOLE = Window()


@dataclass(frozen=True, eq=False)
class Prefix:
    """What the layers of a model stored while they read `ids`, [batch, heads, seq, dim] twice per layer."""

    loaded: LoadedModel
    ids: Tensor
    stored: dict[int, tuple[Tensor, Tensor]]

    def first(self, tokens: int) -> "Prefix":
        """The prefix's own first tokens."""
        if tokens == self.ids.shape[1]:
            return self
        stored = {i: (keys[:, :, :tokens], values[:, :, :tokens]) for i, (keys, values) in self.stored.items()}
        return Prefix(self.loaded, self.ids[:, :tokens], stored)

    def cache(self, codec: Compressor | None, window: Window = WHOLE) -> Any:
        """A new cache that holds the prefix: an ordinary one without a codec, a `MeasuringCache` with one.

        What makes caches of its own is asked for one. Raises `CodecError` when it is to keep a window.
        """
        if codec is None:
            return plain_cache(self.loaded.model, self.stored)
        if isinstance(codec, CacheMaker):
            if window != WHOLE:
                raise CodecError(f"{codec.name} is a cache of its own: it cannot be given a window")
            return codec.cache_of(self)
        cache = MeasuringCache(self.loaded.model, codec, window=window.tokens, block=window.block)
        for layer_idx, (keys, values) in self.stored.items():
            cache.update(keys, values, layer_idx)
        return cache

    def logits(self, ids: Tensor, codec: Compressor | None, window: Window = WHOLE) -> Tensor:
        """Logits of `ids` [batch, seq] that follow the prefix, which is read through a new cache."""
        return read(self.loaded, ids, self.cache(codec, window))


def read_prefix(loaded: LoadedModel, ids: Tensor) -> Prefix:
    """Read `ids` [batch, seq] once, uncompressed; seq may be 0.

    Raises `UnsupportedArchitectureError` where layers keep states, or more than keys and values per token: such models
    do not read a text in pieces as they read it whole.
    """
    cache, stored = tapped_cache(loaded.model)
    for layer_idx, layer in enumerate(cache.layers):
        if type(layer).__name__ not in _KEYS_AND_VALUES:
            raise UnsupportedArchitectureError(
                f"{loaded.name}: layer {layer_idx} keeps a {type(layer).__name__}, not keys and values: "
                "its quality through the cache cannot be measured"
            )
    if ids.shape[1]:
        loaded.model.base_model(input_ids=ids, past_key_values=cache, use_cache=True)
    return Prefix(loaded, ids, stored)


def read(loaded: LoadedModel, ids: Tensor, cache: Any, codec: str = "a codec") -> Tensor:
    """Logits of the next tokens through a cache, which holds them afterwards. Raises `NonFiniteError`."""
    logits = loaded.model(input_ids=ids, past_key_values=cache, use_cache=True).logits
    require_finite(logits, codec)
    return logits


def require_finite(logits: Tensor, codec: str = "a codec") -> None:
    """Raises `NonFiniteError` where logits hold NaN or infinite values."""
    if not torch.stack(torch.aminmax(logits)).isfinite().all():
        raise NonFiniteError(
            f"logits through the cache of {codec} hold NaN or infinite values: use a wider `dtype` or another codec"
        )


def check_positions(loaded: LoadedModel, tokens: int) -> None:
    """Raises `ModelError` when a model with learned positions has fewer than `tokens` of them."""
    positions = loaded.learned_positions
    if positions and tokens > positions:
        raise ModelError(f"{loaded.name} has {positions} positions, {tokens} tokens are to be read: use shorter contexts")
