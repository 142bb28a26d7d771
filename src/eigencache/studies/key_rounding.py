"""How large the biases of keys are, and what fp8 and int8 keys cost with them and without the mean they are part of."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from eigencache.advice import KeyBias, KeyRounding, Keys
from eigencache.codec.base import Codec
from eigencache.codec.rounding import KINDS, RoundedKeys, Rounding
from eigencache.corpora.sequences import Sequences
from eigencache.evaluate.likelihood import UNCOMPRESSED, batches_of, score_through_cache
from eigencache.evaluate.summary import summarise
from eigencache.models.capture import Capture
from eigencache.models.key_bias import key_biases
from eigencache.models.load import LoadedModel, fingerprint
from eigencache.quality import Protocol, Quality, SequenceLoss
from eigencache.spectral.rope import Rotation
from eigencache.studies.gather import Progress
from eigencache.studies.resume import Partial

_SEQUENCES = 8  # of the calibration text: means need far fewer vectors than bases


def measure_keys(
    loaded: LoadedModel,
    sequences: Sequences,
    calibration: Sequences,
    rotations: Mapping[int, Rotation],
    protocol: Protocol,
    *,
    batch_size: int = 8,
    partial: Path | None = None,
    on_progress: Progress = lambda *_: None,
) -> Keys | None:
    """Biases per layer, and the loss of rounded keys on `sequences`; means from `calibration`. None without biases."""
    biases = key_biases(loaded)
    if not biases:
        return None
    means, norms = _means_and_norms(loaded, calibration)
    sizes = [_size(layer_idx, bias, norms[layer_idx]) for layer_idx, bias in biases.items()]
    codecs: dict[tuple[Rounding, bool], RoundedKeys] = {
        (kind, mean_out): RoundedKeys(
            f"K {kind}{', mean taken out' if mean_out else ''}",
            kind,
            loaded.model.dtype,
            means if mean_out else {},
            rotations,
        )
        for kind in KINDS
        for mean_out in (False, True)
    }
    named = {codec.name: codec for codec in codecs.values()}
    found = score_codecs(loaded, sequences, named, protocol, batch_size=batch_size, partial=partial, on_progress=on_progress)
    roundings = [
        KeyRounding(kind=kind, mean_out=mean_out, quality=found[codec.name]) for (kind, mean_out), codec in codecs.items()
    ]
    return Keys(biases=sizes, roundings=roundings)


def score_codecs(
    loaded: LoadedModel,
    sequences: Sequences,
    codecs: Mapping[str, Codec],
    protocol: Protocol,
    *,
    batch_size: int = 8,
    partial: Path | None = None,
    on_progress: Progress = lambda *_: None,
) -> dict[str, Quality]:
    """What every codec costs on `sequences`, each against the uncompressed cache; resumed from `partial`."""
    key = {
        "model": fingerprint(loaded.model),
        "text": sequences.corpus.model_dump(),
        "protocol": protocol.model_dump(),
        "codecs": {name: codec.nbytes for name, codec in codecs.items()},
        "batch": batch_size,
    }
    kept = Partial(partial, key)
    total = len(batches_of(sequences, protocol, batch_size))
    on_progress("scoring", len(kept.done), total)
    for scored in score_through_cache(loaded, sequences, codecs, protocol, batch_size=batch_size, skip=len(kept.done)):
        losses = {name: [loss.model_dump() for loss in rows] for name, rows in scored.losses.items()}
        kept.add({"losses": losses, "held": scored.held})
        on_progress("scoring", len(kept.done), total)

    def losses_of(name: str) -> list[SequenceLoss]:
        return [SequenceLoss(**loss) for batch in kept.done for loss in batch["losses"][name]]

    return {
        name: summarise(
            name,
            losses_of(name),
            losses_of(UNCOMPRESSED),
            encoded_tokens=sum(batch["held"][name][0] for batch in kept.done),
            encoded_nbytes=sum(batch["held"][name][1] for batch in kept.done),
            values_per_token=loaded.geometry.values_per_token,
            basis_nbytes=codec.nbytes,
        )
        for name, codec in codecs.items()
    }


def _means_and_norms(loaded: LoadedModel, calibration: Sequences) -> tuple[dict[int, Tensor], dict[int, float]]:
    """Layer → mean of the keys before rotation [heads, dim], and mean norm of all heads of a layer joined."""
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
    channels = bias.abs().flatten().double()
    median = float(channels.median())
    return KeyBias(
        layer_idx=layer_idx,
        bias_norm=float(channels.norm()),
        mean_key_norm=mean_key_norm,
        largest_to_median=float(channels.max()) / median if median else float("inf"),
    )
