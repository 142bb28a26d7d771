"""The bias that a model adds to its keys, in the layout that the capture verified against the cache."""

import torch
from torch import Tensor

from eigencache.models.adapters import adapter_for
from eigencache.models.capture import Capture
from eigencache.models.linear_map import bias_of
from eigencache.models.load import LoadedModel

_PROBE_TOKENS = 16


def key_biases(loaded: LoadedModel) -> dict[int, Tensor]:
    """Return the bias of the keys before rotation by layer, [heads, dim] in float32.

    Layers are absent if they have no bias, if a norm follows the bias (its effect then differs by token), or if their keys
    could not be verified before rotation. MLA models have none, because their bias belongs to the latent. Cost: one
    forward pass over 16 tokens.
    """
    if loaded.geometry.mla or not loaded.geometry.key_bias:
        return {}
    ids = torch.randint(1, loaded.embedded_ids, (1, _PROBE_TOKENS), generator=torch.Generator().manual_seed(0))
    with Capture(loaded.model, loaded.geometry) as capture:
        capture.run(ids.to(loaded.device))
    readings, hidden = capture.readings, loaded.model.config.get_text_config(decoder=True).hidden_size
    biases: dict[int, Tensor] = {}
    for module in loaded.model.modules():
        layer_idx = getattr(module, "layer_idx", None)
        style = adapter_for(module)
        if style is None or layer_idx not in readings or layer_idx in biases:
            continue
        role, projection = next((r, m) for r, m in style.modules(module).items() if r in ("keys", "fused"))
        inputs = getattr(projection, "in_features", hidden)
        bias = bias_of(projection, inputs, f"layer {layer_idx}, the projection of keys")
        if bias is None:
            continue
        outputs = {role: bias.detach().float()[None, None]}
        for reading in style.readings(outputs, loaded.geometry.layers[layer_idx], 1):
            if reading.how == readings[layer_idx]:
                biases[layer_idx] = reading.keys[0, :, 0].cpu()
    return biases
