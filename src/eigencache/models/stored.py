"""transformers caches in and out of plain tensors: what a codec encodes, and a cache to go on from.

What is decoded is a `DynamicCache` like any other. Keys stand at the positions they had.
"""

from typing import Any

from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from eigencache.codec.base import Cached
from eigencache.errors import CodecError


def cached_of(cache: Any) -> dict[int, tuple[Tensor, Tensor]]:
    """Layer → keys and values [batch, heads, seq, dim] of a transformers cache; layers that hold none are left out.

    Raises `CodecError` for a cache that is empty, and for one that holds something else than keys and values.
    """
    layers = getattr(cache, "layers", None)
    if layers is None:
        raise CodecError(f"{type(cache).__name__} is no transformers cache: hand over what a model gave as past_key_values")
    found = {}
    for layer_idx, layer in enumerate(layers):
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
            raise CodecError(
                f"layer {layer_idx} is a {type(layer).__name__}: keys and values of a dynamic cache are encoded"
            )
        if layer.is_initialized:
            found[layer_idx] = (layer.keys.detach(), layer.values.detach())
    if not found:
        raise CodecError("the cache is empty: let the model read something first")
    return found


def first_position(cache: Any) -> int:
    """Position of the first token that any layer still holds: 0 unless all layers have a window and have moved on."""
    return min(
        layer.get_seq_length() - layer.keys.shape[2] for layer in cache.layers if getattr(layer, "is_initialized", False)
    )


def cache_holding(model: PreTrainedModel, cached: Cached, start: int, tokens: int) -> DynamicCache:
    """A dynamic cache of `tokens` tokens from position `start`; layers with a window may hold the last of them only.

    Where all layers have a window it has seen all tokens before them too, so that positions go on by themselves.
    """
    cache = DynamicCache(config=model.config)
    windows = all(isinstance(cache.layers[layer_idx], DynamicSlidingWindowLayer) for layer_idx in cached)
    for layer_idx, (keys, values) in cached.items():
        cache.update(keys, values, layer_idx)
        layer = cache.layers[layer_idx]
        if isinstance(layer, DynamicSlidingWindowLayer):
            layer.cumulative_length = tokens + (start if windows else 0)
        elif keys.shape[2] != tokens:
            raise CodecError(f"layer {layer_idx} holds {keys.shape[2]} tokens of {tokens} and has no window")
    return cache
