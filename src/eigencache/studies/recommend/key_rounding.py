"""Measure the biases of keys, and the loss of fp8 and int8 keys with and without subtraction of their mean."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from eigencache.calibration.session import Session
from eigencache.codec.baselines.rounded_keys import KINDS, RoundedKeys, Rounding
from eigencache.corpora.sequences import Sequences
from eigencache.evaluate.codec_scoring import score_codecs
from eigencache.models.capture import Capture
from eigencache.models.key_bias import key_biases
from eigencache.models.load import LoadedModel
from eigencache.records.advice import KeyBias, KeyRounding, Keys
from eigencache.records.quality import ReadingProtocol
from eigencache.spectral.rope import Rotation

_SEQUENCES = 8  # calibration sequences to read (up to twice as many): means need far fewer vectors than bases


def measure_keys(
    session: Session,
    sequences: Sequences,
    calibration: Sequences,
    rotations: Mapping[int, Rotation],
    protocol: ReadingProtocol,
    *,
    partial: Path | None = None,
) -> Keys | None:
    """Measure the key bias of every layer and the loss of rounded keys.

    Args:
        session: Model and settings to run it with.
        sequences: Held-out text to score.
        calibration: Text from which the mean keys are computed.
        rotations: RoPE rotation by layer index.
        protocol: Reading protocol.
        partial: File that keeps finished results, to resume from. Default: none.

    Returns:
        Biases and losses, or None if the keys have no bias.
    """
    biases = key_biases(session.loaded)
    if not biases:
        return None
    means, norms = _means_and_norms(session.loaded, calibration)
    sizes = [_size(layer_idx, bias, norms[layer_idx]) for layer_idx, bias in biases.items()]
    codecs: dict[tuple[Rounding, bool], RoundedKeys] = {
        (kind, mean_out): RoundedKeys(
            f"K {kind}{', mean taken out' if mean_out else ''}",
            kind,
            session.loaded.model.dtype,
            means if mean_out else {},
            rotations,
        )
        for kind in KINDS
        for mean_out in (False, True)
    }
    named = {codec.name: codec for codec in codecs.values()}
    qualities = score_codecs(
        session,
        sequences,
        named,
        protocol,
        calibration=calibration.corpus,
        partial=partial,
    ).quality
    roundings = [
        KeyRounding(kind=kind, mean_out=mean_out, quality=qualities[codec.name])
        for (kind, mean_out), codec in codecs.items()
    ]
    return Keys(biases=sizes, roundings=roundings)


def _means_and_norms(loaded: LoadedModel, calibration: Sequences) -> tuple[dict[int, Tensor], dict[int, float]]:
    """Return, by layer, the mean key before RoPE [heads, dim] and the mean norm of the concatenated heads."""
    ids = calibration.ids[:: max(1, len(calibration.ids) // _SEQUENCES)]
    sums: dict[int, Tensor] = {}
    norms: dict[int, float] = {}
    tokens = 0
    with Capture(loaded.model, loaded.geometry) as capture:
        for row in ids:
            for layer in capture.run(torch.from_numpy(row)[None].to(loaded.device)):
                keys = layer.tensors["keys_pre_rope" if "keys_pre_rope" in layer.tensors else "keys"][0].double().cpu()
                sums[layer.layer_idx] = sums.get(layer.layer_idx, 0) + keys.sum(1)
                norm = float(keys.square().sum((0, 2)).sqrt().sum())
                norms[layer.layer_idx] = norms.get(layer.layer_idx, 0.0) + norm
            tokens += len(row)
    return {i: (total / tokens).float() for i, total in sums.items()}, {i: total / tokens for i, total in norms.items()}


def _size(layer_idx: int, bias: Tensor, mean_key_norm: float) -> KeyBias:
    """Relate a bias to the mean norm of the keys and to its own median channel."""
    channels = bias.abs().flatten().double()
    median = float(channels.median())
    return KeyBias(
        layer_idx=layer_idx,
        bias_norm=float(channels.norm()),
        mean_key_norm=mean_key_norm,
        largest_to_median=float(channels.max()) / median if median else float("inf"),
    )
