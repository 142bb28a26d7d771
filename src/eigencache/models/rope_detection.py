"""The rotation of every layer as a codec needs it: which slot of the cache is rotated, how, at any position."""

from typing import Any

import torch

from eigencache.errors import StatisticsError, UnsupportedArchitectureError
from eigencache.models.capture import Capture
from eigencache.models.load import LoadedModel
from eigencache.spectral.rope import Rotation, rotation_from

_PROBE_TOKENS = 64
_PROBE_TOKENS_16_BIT = 512  # a table of 16 bits tells frequencies only by many positions


def steady_tokens(config: Any) -> int | None:
    """Tokens up to which a text's keys are all rotated by the same frequencies; None: any number.

    For a text longer than those of pretraining, longrope takes another set, and dynamic NTK a new one for each length.
    """
    config = config.get_text_config(decoder=True)
    parameters = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    nested = [one for one in parameters.values() if isinstance(one, dict) and "rope_type" in one]  # by kind of layer
    found = []
    for one in nested or [parameters]:
        kind, trained = str(one.get("rope_type") or one.get("type")), one.get("original_max_position_embeddings")
        if kind == "longrope":
            found.append(trained or getattr(config, "original_max_position_embeddings", None))
        elif "dynamic" in kind:
            found.append(getattr(config, "max_position_embeddings", None))
    return min((int(one) for one in found if one), default=None)


def require_steady(loaded: LoadedModel, tokens: int) -> None:
    """Raises `StatisticsError` for sequences of so many tokens where the model rotates them otherwise than shorter ones."""
    steady = steady_tokens(loaded.model.config)
    if steady is not None and tokens > steady:
        raise StatisticsError(
            f"sequences of {tokens} tokens: in texts of over {steady} {loaded.name} rotates keys with other frequencies, "
            f"and a codec knows one set: give `max_length` {steady} at most"
        )


def rotations_of(loaded: LoadedModel) -> dict[int, Rotation]:
    """Layer → rotation of its keys (of the rotary key for MLA); layers that rotate nothing are absent.

    Raises `UnsupportedArchitectureError` naming the layers where the rotation could not be identified.
    """
    tokens = _PROBE_TOKENS if loaded.model.dtype.itemsize > 2 else _PROBE_TOKENS_16_BIT
    config = loaded.model.config
    if steady := steady_tokens(config):
        tokens = min(tokens, steady - 1)  # after a longer text, one of as many does not bring the first frequencies back
    tokens = min(tokens, getattr(config, "max_position_embeddings", None) or tokens)
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
