"""Detection of the rotation of every layer from a forward pass, as a function of the position."""

from typing import Any

import torch

from eigencache.errors import StatisticsError, UnsupportedArchitectureError
from eigencache.models.capture import Capture
from eigencache.models.load import LoadedModel
from eigencache.spectral.rope import Rotation, rotation_from

_PROBE_TOKENS = 64
_PROBE_TOKENS_16_BIT = 512  # frequencies from a rounded 16-bit table need many positions


def steady_tokens(config: Any) -> int | None:
    """Return the maximum sequence length for which all keys are rotated by one set of frequencies; None: any length.

    Beyond the length of pretraining, longrope uses another set of frequencies, and dynamic NTK a different one for each
    length.

    Args:
        config: A `transformers` configuration.
    """
    config = config.get_text_config(decoder=True)
    parameters = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    nested = [value for value in parameters.values() if isinstance(value, dict) and "rope_type" in value]  # by layer type
    limits = []
    for rope in nested or [parameters]:
        kind, trained = str(rope.get("rope_type") or rope.get("type")), rope.get("original_max_position_embeddings")
        if kind == "longrope":
            limits.append(trained or getattr(config, "original_max_position_embeddings", None))
        elif "dynamic" in kind:
            limits.append(getattr(config, "max_position_embeddings", None))
    return min((int(limit) for limit in limits if limit), default=None)


def require_steady(loaded: LoadedModel, tokens: int) -> None:
    """Check that the model rotates sequences of a length by the same frequencies as shorter ones.

    Args:
        loaded: The model.
        tokens: Sequence length.

    Raises:
        StatisticsError: The sequences are longer than `steady_tokens`.
    """
    steady = steady_tokens(loaded.model.config)
    if steady is not None and tokens > steady:
        raise StatisticsError(
            f"sequences of {tokens} tokens: beyond {steady} tokens {loaded.name} rotates keys with other frequencies, "
            f"and a codec has one set only: use `max_length` {steady} or less"
        )


def rotations_of(loaded: LoadedModel) -> dict[int, Rotation]:
    """Return the rotation of the keys (for MLA, of the rotary key) by layer; layers without rotation are absent.

    Cost: one forward pass over 64 tokens, 512 in 16 bits.

    Raises:
        UnsupportedArchitectureError: The rotation of a layer could not be identified; the message names the layers.
    """
    tokens = _PROBE_TOKENS if loaded.model.dtype.itemsize > 2 else _PROBE_TOKENS_16_BIT
    config = loaded.model.config
    if steady := steady_tokens(config):
        # At `steady` tokens a model that has seen a longer text does not restore its first frequencies.
        tokens = min(tokens, steady - 1)
    tokens = min(tokens, getattr(config, "max_position_embeddings", None) or tokens)
    ids = torch.randint(1, loaded.embedded_ids, (1, tokens), generator=torch.Generator().manual_seed(0))
    rotations, unknown = {}, []
    with Capture(loaded.model, loaded.geometry) as capture:
        for layer in capture.run(ids.to(loaded.device)):
            if layer.angles is None or layer.pairing is None:
                if any(name.endswith("_post_rope") for name in layer.tensors):
                    unknown.append(layer.layer_idx)
            elif rotation := rotation_from(layer.angles, layer.pairing):
                rotations[layer.layer_idx] = rotation
            else:
                unknown.append(layer.layer_idx)
    if unknown:
        raise UnsupportedArchitectureError(
            f"{loaded.name}: the rotation of layers {', '.join(map(str, unknown))} could not be identified, "
            "so no codec can be fitted to this model. `eigencache probe` can still measure it."
        )
    return rotations
