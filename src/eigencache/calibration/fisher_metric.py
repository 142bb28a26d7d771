"""The Fisher metric of a model's cache: E[g gᵀ], g = ∂NLL/∂(cached vector), the one metric with a common scale.

THEORY 4.4. Empirical Fisher: the targets are those of the text. Cost: about three forward passes.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from eigencache.corpora.sequences import Sequences
from eigencache.geometry import Layer
from eigencache.models.gradients import cache_gradients
from eigencache.models.load import LoadedModel
from eigencache.spectral.rope import Rotation, unrotate

Metrics = dict[str, dict[int, Tensor]]  # tensor name → layer → [heads, dim, dim] float64
OnBatch = Callable[[int, int], None]


def fisher_metrics(
    loaded: LoadedModel,
    sequences: Sequences,
    rotations: dict[int, Rotation],
    *,
    batch_size: int = 4,
    on_batch: OnBatch = lambda *_: None,
) -> Metrics:
    """E[g gᵀ] per KV head, layer and slot, in every frame the slot has.

    The gradient of a key before rotation is Aᵀ g of the cached one, A being the rotation.
    """
    sums: Metrics = {}
    tokens, done = 0, 0
    for input_ids, attention_mask, indices in sequences.batches(batch_size, pad_id=0):
        padded = bool((attention_mask == 0).any())
        mask = attention_mask.to(loaded.device) if padded else None
        for layer_idx, slots in cache_gradients(loaded.model, input_ids.to(loaded.device), mask).items():
            for name, gradient in _framed(loaded.geometry.layers[layer_idx], slots, rotations.get(layer_idx)):
                rows = gradient.transpose(0, 1).flatten(1, 2).double()  # of padding they are zero
                layers = sums.setdefault(name, {})
                layers[layer_idx] = layers.get(layer_idx, 0) + rows.mT @ rows
        tokens += int(attention_mask.sum())
        done += len(indices)
        on_batch(done, len(sequences.ids))
    return {name: {i: total / tokens for i, total in layers.items()} for name, layers in sums.items()}


def _framed(layer: Layer, slots: tuple[Tensor, Tensor], rotation: Rotation | None) -> Iterator[tuple[str, Tensor]]:
    """The gradients of both slots under the tensor names of every frame they have."""
    rotated, prefix, other = (1, "key_rope", "latent") if layer.mla else (0, "keys", "values")
    yield other, slots[1 - rotated]
    gradient = slots[rotated]
    if rotation is None:
        yield prefix, gradient
        return
    positions = torch.arange(gradient.shape[2])
    before = unrotate(gradient, rotation.angles(positions).to(gradient.device), rotation.pairing)
    before[..., : 2 * len(rotation.frequencies)] *= rotation.scale**2  # `unrotate` is A⁻¹, the chain rule asks for Aᵀ
    yield f"{prefix}_pre_rope", before
    yield f"{prefix}_post_rope", gradient
