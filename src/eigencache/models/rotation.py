"""The rotation of every layer as a codec needs it: which slot of the cache is rotated, how, at any position."""

import torch

from eigencache.errors import UnsupportedArchitectureError
from eigencache.models.capture import Capture
from eigencache.models.load import LoadedModel
from eigencache.spectral.rope import Rotation, rotation_from

_PROBE_TOKENS = 64
_PROBE_TOKENS_16_BIT = 512  # a table of 16 bits tells frequencies only by many positions


def rotations_of(loaded: LoadedModel) -> dict[int, Rotation]:
    """Layer → rotation of its keys (of the rotary key for MLA); layers that rotate nothing are absent.

    Raises `UnsupportedArchitectureError` naming the layers where the rotation could not be identified.
    """
    tokens = _PROBE_TOKENS if loaded.model.dtype.itemsize > 2 else _PROBE_TOKENS_16_BIT
    tokens = min(tokens, getattr(loaded.model.config, "max_position_embeddings", None) or tokens)
    ids = torch.randint(1, loaded.embedded_ids, (1, tokens), generator=torch.Generator().manual_seed(0))
    found, unknown = {}, []
    with Capture(loaded.model, loaded.geometry) as capture:
        for layer in capture.run(ids.to(loaded.device)):
            if layer.angles is None or layer.pairing is None:
                if any(name.endswith("_post_rope") for name in layer.tensors):
                    unknown.append(layer.layer_idx)
            elif rotation := rotation_from(layer.angles, layer.pairing):
                found[layer.layer_idx] = rotation
            else:
                unknown.append(layer.layer_idx)
    if unknown:
        raise UnsupportedArchitectureError(
            f"{loaded.name}: the rotation of layers {', '.join(map(str, unknown))} could not be identified: "
            "keys can be compressed after rotation only (`frame` post)"
        )
    return found
