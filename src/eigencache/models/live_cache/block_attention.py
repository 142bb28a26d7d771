"""Attention to the packed blocks of a layer: by one kernel, or as separate logits and weighted sums."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from eigencache.codec.live.packed_heads import PackedHeads
from eigencache.kernels.packed.backend import BackendName, PackedBackend, packed_backend
from eigencache.kernels.packed.format import BLOCK
from eigencache.kernels.packed.reference import AttentionQueries, PackedStorage
from eigencache.models.live_cache.layer import CompressedLayer


@dataclass(frozen=True)
class PartialAttention:
    """Attention over some of the tokens, which can be merged with attention over the others.

    Attributes:
        top: Largest logit [batch, query heads, seq, 1] float32.
        total: Sum of exp(logit − top), same shape.
        sums: Values weighted with exp(logit − top) [batch, query heads, seq, dim of values] float32.
    """

    top: Tensor
    total: Tensor
    sums: Tensor


def block_attention(
    layer: CompressedLayer, queries: Sequence[Tensor], visible: tuple[Tensor, Tensor] | None, softcap: float | None
) -> PartialAttention | None:
    """Attend to all packed blocks of a layer with one kernel, without tensors of the past's length.

    Args:
        layer: The layer.
        queries: Queries of the keys [batch, query heads, seq, dim], or of latents and of rotary keys.
        visible: First packed token that each query attends to, and one past the last, each [batch, query heads, seq]; None
            for all.
        softcap: Soft cap of logits; None for none.

    Returns:
        The attention; None if the backend has no kernel for it.
    """
    heads, (batch, _, seq, _) = layer.heads, queries[0].shape
    rows, backend = _rows(heads[0], queries[0], layer.backend)
    bundles = len(heads[0].widths)
    if backend.attention is None or bundles != len(heads[1].widths):
        return None
    by_slot = [(slot, _rows(slot, q, layer.backend)[0]) for slot, q in zip(heads, queries, strict=False)]
    projected = [slot.queries(x, backend) for slot, x in by_slot]
    constant = sum((_constant(*pair) for pair in by_slot[1:]), _constant(*by_slot[0]))
    mean_logits = None
    for slot, x in by_slot:
        if slot.rotated_mean is not None:  # at most one slot is rotated
            mean_logits = slot.rotated_mean.logit_factors(x, layer.starts(0, layer.blocks)).bundled(bundles)
    seen = None if visible is None else (visible[0].reshape(batch, bundles, -1), visible[1].reshape(batch, bundles, -1))
    constant, exact = constant.view(batch, bundles, -1), layer.states_dtype == torch.float32
    keys, values = ([chunk.slot(slot) for chunk in layer.chunks] for slot in (0, 1))
    top, total, sums = backend.attention(
        PackedStorage(keys, values, (heads[0].widths, heads[1].widths)),
        AttentionQueries(projected[0], constant, projected[1] if projected[1:] else None, mean_logits, seen, softcap, exact),
    )
    weighted = heads[0 if projected[1:] else 1]
    vectors = torch.addcmul(
        weighted.expanded(sums, backend), weighted.offset[:, None], total.view(batch, -1, rows.shape[2], 1)
    )
    return PartialAttention(*(x.reshape(batch, -1, seq, x.shape[-1]) for x in (top[..., None], total[..., None], vectors)))


def block_logits(layer: CompressedLayer, slot: int, q: Tensor) -> Tensor:
    """Return the logits q · x̂ of all packed tokens, rotated means included.

    Args:
        layer: The layer.
        slot: 0 for what is stored as keys, 1 for what is stored as values.
        q: Queries [batch, query heads, seq, dim].

    Returns:
        [batch, query heads, seq, tokens] float32, a new tensor.
    """
    heads = layer.heads[slot]
    rows, backend = _rows(heads, q, layer.backend)
    projected = heads.queries(rows, backend)
    by_chunk = [backend.logits(chunk.slot(slot), heads.widths, projected) for chunk in layer.chunks]
    logits = (by_chunk[0] if len(by_chunk) == 1 else torch.cat(by_chunk, -1)).view(*rows.shape[:3], -1)
    logits = logits.add_(_constant(heads, rows))
    if heads.rotated_mean is not None:
        logits = logits.add_(heads.rotated_mean.logits(rows, layer.starts(0, layer.blocks)))
    return logits.view(*q.shape[:3], -1)


def block_sums(layer: CompressedLayer, slot: int, weights: Tensor) -> Tensor:
    """Return the weighted sums Σ a x̂ over all packed tokens.

    Args:
        layer: The layer.
        slot: 0 for what is stored as keys, 1 for what is stored as values.
        weights: a [batch, query heads, seq, tokens] float32.

    Returns:
        [batch, query heads, seq, dim] float32.
    """
    heads = layer.heads[slot]
    rows, backend = _rows(heads, weights, layer.backend)
    bundled = rows.reshape(len(rows), len(heads.widths), -1, rows.shape[3])
    parts = bundled.split([BLOCK * chunk.filled for chunk in layer.chunks], -1)
    sums = [backend.sums(chunk.slot(slot), heads.widths, part) for chunk, part in zip(layer.chunks, parts, strict=True)]
    vectors = heads.expanded(sum(sums[1:], sums[0]), backend) + heads.offset[:, None] * rows.sum(-1, keepdim=True)
    return vectors.view(*weights.shape[:3], -1)


def _rows(heads: PackedHeads, x: Tensor, backend: BackendName | None) -> tuple[Tensor, PackedBackend]:
    """Reshape x [batch, query heads, seq, n] to [batch, KV heads, rows, n], and choose a backend for that many rows."""
    rows = x.reshape(len(x), len(heads.mean), -1, x.shape[3])
    return rows, packed_backend(x, rows.shape[2] * len(heads.mean) // len(heads.widths), backend)


def _constant(heads: PackedHeads, rows: Tensor) -> Tensor:
    """Return the part of the logits that is equal for all tokens [batch, KV heads, rows, 1]."""
    return rows @ heads.offset[..., None]
