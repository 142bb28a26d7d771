"""Conversion between transformers caches and plain tensors.

`cached_of` returns the tensors that a codec encodes. `cache_holding` makes a `DynamicCache` of decoded tensors, from which a
model can continue; keys keep their positions.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from eigencache.codec.base import Cached
from eigencache.errors import CodecError


def cached_of(cache: Any) -> dict[int, tuple[Tensor, Tensor]]:
    """Return layer index → keys and values [batch, heads, seq, dim] of a transformers cache, without empty layers.

    Raises:
        CodecError: The cache is empty or no transformers cache, or it contains more than keys and values.
    """
    layers = getattr(cache, "layers", None)
    if layers is None:
        raise CodecError(
            f"`cache` is of type {type(cache).__name__}, not a transformers cache: pass the `past_key_values` of a "
            "model's output"
        )
    cached = {}
    for layer_idx, layer in enumerate(layers):
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer, StretchLayer):
            raise CodecError(
                f"layer {layer_idx} of the cache is a {type(layer).__name__}, which cannot be encoded: use a DynamicCache"
            )
        if layer.is_initialized:
            cached[layer_idx] = (layer.keys.detach(), layer.values.detach())
    if not cached:
        raise CodecError("the cache is empty: run the model on some text first")
    return cached


def tensors_of(thing: Any) -> Iterator[Tensor]:
    """Yield all plain tensors inside dicts, lists, tuples, and tensors that consist of tensors."""
    if hasattr(thing, "__tensor_flatten__"):
        thing = [getattr(thing, name) for name in thing.__tensor_flatten__()[0]]
    if isinstance(thing, Tensor):
        yield thing
    elif isinstance(thing, dict | list | tuple):
        for part in thing.values() if isinstance(thing, dict) else thing:
            yield from tensors_of(part)


def first_slot(cache: Any) -> int:
    """Return the first slot that any layer still holds: above 0 only if all layers have sliding windows that have moved."""
    return min(
        layer.get_seq_length() - layer.keys.shape[2] for layer in cache.layers if getattr(layer, "is_initialized", False)
    )


def padding_of(attention_mask: Any, slots: int) -> int:
    """Return how many slots of a cache with one row are padding.

    Args:
        attention_mask: The mask that the model was given [1, slots] or [slots].
        slots: Number of slots of the cache.

    Raises:
        CodecError: The mask has another shape, masks every slot, or masks a slot after a token.
    """
    attended = _by_slot(attention_mask, "`attention_mask` is", slots) != 0
    tokens = int(attended.sum())
    if not tokens:
        raise CodecError(
            "`attention_mask` is 0 everywhere, so there is no token to encode: pass the mask that the model was given"
        )
    if not attended[-tokens:].all():
        raise CodecError("`attention_mask` has padding after a token, and only left padding can be encoded: pad on the left")
    return slots - tokens


def position_at(position_ids: Any, first: int, slots: int) -> int:
    """Return the position of slot `first`.

    Args:
        position_ids: The positions that the model was given [1, slots] or [slots].
        first: Slot of the first token.
        slots: Number of slots of the cache.

    Raises:
        CodecError: The positions have another shape, are negative, or do not increase by 1 from `first` on.
    """
    text = _by_slot(position_ids, "`position_ids` are", slots)[first:]
    if int(text[0]) < 0 or not (text.diff() == 1).all():
        raise CodecError("`position_ids` must increase by 1 from token to token, from 0 or more")
    return int(text[0])


def _by_slot(given: Any, said: str, slots: int) -> Tensor:
    """Return one number per slot [slots] on the CPU. Raises `CodecError`, which begins with `said`, for another shape."""
    by_slot = torch.as_tensor(given).cpu()
    if by_slot.numel() != slots or by_slot.shape[-1:] != (slots,):
        raise CodecError(f"{said} of shape {list(by_slot.shape)}, but the cache has 1 row of {slots} tokens")
    return by_slot.flatten()


def without_padding(cache: Any, cached: Cached, padding: int) -> dict[int, tuple[Tensor, Tensor]]:
    """Return the tensors of a cache without its padding.

    Args:
        cache: A transformers cache with one row.
        cached: Its tensors, as `cached_of` returns them.
        padding: Number of first slots that are padding.
    """
    tokens = {}
    for layer_idx, (keys, values) in cached.items():
        first = max(0, padding - cache.layers[layer_idx].get_seq_length() + keys.shape[2])
        tokens[layer_idx] = (keys[:, :, first:], values[:, :, first:])
    return tokens


class StretchLayer(DynamicLayer):
    """Layer whose first `absent` tokens are missing: they count as read, but are not attended to."""

    def __init__(self, absent: int) -> None:
        super().__init__()
        self.absent = absent

    def get_seq_length(self) -> int:
        """Return the number of tokens read, absent ones included."""
        return self.absent + super().get_seq_length()

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return length and offset of what attention reads."""
        return self.get_seq_length() - self.absent + query_length, self.absent


def cache_holding(model: PreTrainedModel, cached: Cached, start: int, tokens: int) -> DynamicCache:
    """Return a `DynamicCache` of `tokens` tokens from position `start`.

    Tokens before `start` count as read, so that the positions of further tokens are right.

    Args:
        model: Model that will use the cache.
        cached: Layer index → keys and values; layers with a sliding window may have the last tokens only.
        start: Position of the first token.
        tokens: Number of tokens.

    Raises:
        CodecError: A layer lacks tokens that the next token attends to.
    """
    cache = DynamicCache(config=model.config)
    for layer_idx, (keys, values) in cached.items():
        held, layer = keys.shape[2], cache.layers[layer_idx]
        if isinstance(layer, DynamicSlidingWindowLayer):
            needed, stop = min(layer.sliding_window - 1, start + tokens), start + tokens
            if held < needed:
                raise CodecError(
                    f"layer {layer_idx} attends to the last {needed} tokens before position {stop}, but only {held} are "
                    "present: decode up to the last encoded token, and from before its sliding window"
                )
        elif held != tokens:
            raise CodecError(f"layer {layer_idx} has {held} of {tokens} tokens and no sliding window: pass all tokens")
        elif start:
            cache.layers[layer_idx] = StretchLayer(start)
        cache.update(keys, values, layer_idx)
        if isinstance(layer, DynamicSlidingWindowLayer):
            layer.cumulative_length = start + tokens
    return cache
