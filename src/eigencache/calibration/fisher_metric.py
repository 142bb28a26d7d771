"""The Fisher metric of a cache: E[g gᵀ] of g = ∂NLL/∂(cached vector). It has a common scale for all layers and slots.

This is the empirical Fisher: the targets are the tokens of the text (THEORY 4.4). It costs about three forward passes.

The first tokens of a sequence are left out. Codecs store them exactly, and in a pretrained model nearly all of the gradient
belongs to them: they are attention sinks, and would decide which directions of the other tokens are kept.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from eigencache.calibration.gradient_energy import GradientEnergy
from eigencache.calibration.metrics import Metrics, metric
from eigencache.calibration.pass_memory import BACKWARD_TOKENS
from eigencache.calibration.session import Session
from eigencache.codec.sinks_and_window import FIRST_EXACT
from eigencache.corpora.sequences import Sequences
from eigencache.errors import StatisticsError
from eigencache.geometry import Layer
from eigencache.memory import release
from eigencache.models.gradients import cache_gradients
from eigencache.spectral.rope import Rotation, unrotate


@metric("fisher", common_scale=True)
def fisher_metrics(session: Session, sequences: Sequences, rotations: dict[int, Rotation]) -> Metrics:
    """Measure E[g gᵀ] over all but the first tokens, as `measure_fisher` does."""
    return measure_fisher(session, sequences, rotations)[0]


def measure_fisher(session: Session, sequences: Sequences, rotations: dict[int, Rotation]) -> tuple[Metrics, GradientEnergy]:
    """Measure E[g gᵀ] over all but the first tokens, per KV head, layer and slot, in every frame the slot has.

    The gradient of a key before rotation is Aᵀ g, where A is the rotation and g the gradient of the cached key.

    Args:
        session: the model and how it is run.
        sequences: the text.
        rotations: rotation of the keys by layer.

    Returns:
        The metric, and the gradient energy by position, the first tokens included.

    Raises:
        StatisticsError: no sequence is longer than the first tokens.
    """
    if not (tokens := sum(max(0, len(ids) - FIRST_EXACT) for ids in sequences.ids)):
        raise StatisticsError(
            f"No sequence is longer than the {FIRST_EXACT} first tokens, which the Fisher metric leaves out. "
            "Raise `max_length`."
        )
    sums: Metrics = {}
    energy, done = GradientEnergy(), 0
    rows = min(session.batch_size, max(1, BACKWARD_TOKENS // max(map(len, sequences.ids))))
    for input_ids, attention_mask, indices in sequences.batches(rows, pad_id=0):
        padded = bool((attention_mask == 0).any())
        mask = attention_mask.to(session.loaded.device) if padded else None
        gradients = cache_gradients(session.loaded.model, input_ids.to(session.loaded.device), mask)
        energy.add(gradients, attention_mask.sum(1).tolist())
        for layer_idx, slots in gradients.items():
            for name, gradient in _framed(session.loaded.geometry.layers[layer_idx], slots, rotations.get(layer_idx)):
                g = gradient[:, :, FIRST_EXACT:].transpose(0, 1).flatten(1, 2).double()  # zero for padding
                layers = sums.setdefault(name, {})
                layers[layer_idx] = layers.get(layer_idx, 0) + g.mT @ g
        del gradients
        release()
        done += len(indices)
        session.on_progress("fisher metric", done, len(sequences.ids))
    return {name: {i: total / tokens for i, total in layers.items()} for name, layers in sums.items()}, energy


def _framed(layer: Layer, slots: tuple[Tensor, Tensor], rotation: Rotation | None) -> Iterator[tuple[str, Tensor]]:
    """Yield tensor name and gradient of both slots, in every frame they have."""
    rotated, prefix, other = (1, "key_rope", "latent") if layer.mla else (0, "keys", "values")
    yield other, slots[1 - rotated]
    gradient = slots[rotated]
    if rotation is None:
        yield prefix, gradient
        return
    positions = torch.arange(gradient.shape[2])
    before = unrotate(gradient, rotation.angles(positions).to(gradient.device), rotation.pairing)
    before[..., : 2 * len(rotation.frequencies)] *= rotation.scale**2  # `unrotate` is A⁻¹, the chain rule needs Aᵀ
    yield f"{prefix}_pre_rope", before
    yield f"{prefix}_post_rope", gradient
