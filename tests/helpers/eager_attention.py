"""The attention weights that a model itself returns with its implementation `eager`."""

from typing import Any

import torch


def eager_weights(model: Any, ids: torch.Tensor, mask: torch.Tensor) -> dict[int, torch.Tensor]:
    """Return what the attention layers return [batch, heads, seq, seq], by layer."""
    found, hooks, before = {}, [], model.config._attn_implementation
    for module in model.modules():
        layer_idx = getattr(module, "layer_idx", None)
        if isinstance(layer_idx, int):

            def keep(_module, _args, output, layer_idx: int = layer_idx) -> None:
                if isinstance(output, tuple) and len(output) > 1 and isinstance(output[1], torch.Tensor):
                    found[layer_idx] = output[1]

            hooks.append(module.register_forward_hook(keep))
    try:
        model.set_attn_implementation("eager")
        model.base_model(input_ids=ids, attention_mask=mask)
    finally:
        model.set_attn_implementation(before)
        for hook in hooks:
            hook.remove()
    return {layer_idx: weights for layer_idx, weights in found.items() if weights.ndim == 4}
