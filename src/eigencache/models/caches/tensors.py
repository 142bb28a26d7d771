"""transformers caches in and out of plain tensors: what a codec encodes, and a cache to go on from.

What is decoded is a `DynamicCache` like any other. Keys stand at the positions they had.
"""

from typing import Any

import torch
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
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer, StretchLayer):
            raise CodecError(
                f"layer {layer_idx} is a {type(layer).__name__}: keys and values of a dynamic cache are encoded"
            )
        if layer.is_initialized:
            found[layer_idx] = (layer.keys.detach(), layer.values.detach())
    if not found:
        raise CodecError("the cache is empty: let the model read something first")
    return found


def first_slot(cache: Any) -> int:
    """Slot of the first token that any layer still holds: 0 unless all layers have a window and have moved on."""
    return min(
        layer.get_seq_length() - layer.keys.shape[2] for layer in cache.layers if getattr(layer, "is_initialized", False)
    )


def padding_of(attention_mask: Any, slots: int) -> int:
    """Return how many slots of a cache of one row are padding, from the mask [1, slots] or [slots] that the model was given.

    Raises `CodecError` for a mask of another shape, without a token, or with padding behind a token.
    """
    attended = _by_slot(attention_mask, "`attention_mask` is", slots) != 0
    tokens = int(attended.sum())
    if not tokens:
        raise CodecError("`attention_mask` is 0 everywhere: there is no token to encode")
    if not attended[-tokens:].all():
        raise CodecError(
            "`attention_mask` has padding behind a token: pad on the left, and encode what was read without gaps"
        )
    return slots - tokens


def position_at(position_ids: Any, first: int, slots: int) -> int:
    """Return the position of slot `first`, from the positions [1, slots] or [slots] that the model was given.

    Raises `CodecError` for positions of another shape, and for those that do not go up by 1 from `first` on.
    """
    text = _by_slot(position_ids, "`position_ids` are", slots)[first:]
    if int(text[0]) < 0 or not (text.diff() == 1).all():
        raise CodecError("`position_ids` do not go up by 1 from token to token: neighbors are encoded")
    return int(text[0])


def _by_slot(given: Any, said: str, slots: int) -> Tensor:
    """One number for every slot [slots], on the CPU. Raises `CodecError`, which begins as `said`, for another shape."""
    found = torch.as_tensor(given).cpu()
    if found.numel() != slots or found.shape[-1:] != (slots,):
        raise CodecError(f"{said} {list(found.shape)}: the cache holds 1 row of {slots} tokens")
    return found.flatten()


def without_padding(cache: Any, cached: Cached, padding: int) -> dict[int, tuple[Tensor, Tensor]]:
    """What `cached_of` gives of a cache without the first slots, which hold padding, where a layer still has them."""
    found = {}
    for layer_idx, (keys, values) in cached.items():
        first = max(0, padding - cache.layers[layer_idx].get_seq_length() + keys.shape[2])
        found[layer_idx] = (keys[:, :, first:], values[:, :, first:])
    return found


class StretchLayer(DynamicLayer):
    """Keys and values from position `absent` on: what is before counts as read, and is not attended to."""

    def __init__(self, absent: int) -> None:
        super().__init__()
        self.absent = absent

    def get_seq_length(self) -> int:
        """Tokens read so far, absent ones included."""
        return self.absent + super().get_seq_length()

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of what is attended to."""
        return self.get_seq_length() - self.absent + query_length, self.absent


def cache_holding(model: PreTrainedModel, cached: Cached, start: int, tokens: int) -> DynamicCache:
    """A dynamic cache of `tokens` tokens from position `start`; layers with a window may hold the last of them only.

    Tokens before `start` count as read, so that positions go on by themselves. Raises `CodecError` where a layer with a
    window lacks tokens that the next one attends to.
    """
    cache = DynamicCache(config=model.config)
    for layer_idx, (keys, values) in cached.items():
        held, layer = keys.shape[2], cache.layers[layer_idx]
        if isinstance(layer, DynamicSlidingWindowLayer):
            needed, stop = min(layer.sliding_window - 1, start + tokens), start + tokens
            if held < needed:
                raise CodecError(
                    f"layer {layer_idx} attends to the last {needed} tokens before position {stop}, of which {held} are "
                    "there: decode up to the last token that was encoded, and from before its window on"
                )
        elif held != tokens:
            raise CodecError(f"layer {layer_idx} holds {held} tokens of {tokens} and has no window")
        elif start:
            cache.layers[layer_idx] = StretchLayer(start)
        cache.update(keys, values, layer_idx)
        if isinstance(layer, DynamicSlidingWindowLayer):
            layer.cumulative_length = start + tokens
    return cache
