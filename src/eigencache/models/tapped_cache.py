"""A dynamic cache that exposes the keys and values stored in it."""

from typing import Any
from weakref import ref

from torch import Tensor
from transformers import DynamicCache, PreTrainedModel


def tapped_cache(model: PreTrainedModel, *, track: bool = False) -> tuple[DynamicCache, dict[int, tuple[Tensor, Tensor]]]:
    """Return an ordinary dynamic cache, and a dictionary that receives the keys and values stored in it.

    Args:
        model: The model.
        track: Retain the gradients of the stored tensors in a backward pass.

    Returns:
        The cache, and the latest stored (keys, values) by layer.
    """
    cache = DynamicCache(config=model.config)
    stored: dict[int, tuple[Tensor, Tensor]] = {}

    def tap(layer_idx: int, layer: Any) -> None:
        store, owner = type(layer).update, ref(layer)  # a strong reference would keep all tensors until a garbage collection

        def update(keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> Any:
            if track:
                keys, values = (x if x.requires_grad else x.detach().requires_grad_() for x in (keys, values))
                keys.retain_grad()
                values.retain_grad()
            stored[layer_idx] = (keys, values)
            return store(owner(), keys, values, *args, **kwargs)

        layer.update = update

    for layer_idx, layer in enumerate(cache.layers):
        if hasattr(layer, "update"):
            tap(layer_idx, layer)
    return cache, stored
