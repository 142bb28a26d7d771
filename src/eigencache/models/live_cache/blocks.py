"""Attention to the packed blocks of a layer: at once where a kernel does that, or logits and weighed sums apart."""

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
    """Attention over some tokens: the largest logit, weights relative to it added up, and what they weigh.

    `top` and `total` [batch, query heads, seq, 1], `sums` [batch, query heads, seq, dim of values], float32.
    """

    top: Tensor
    total: Tensor
    sums: Tensor


def block_attention(
    layer: CompressedLayer, queries: Sequence[Tensor], visible: tuple[Tensor, Tensor] | None, softcap: float | None
) -> PartialAttention | None:
    """Of queries [batch, query heads, seq, dim] of keys, or of latents and rotary keys; None: no kernel does it.

    `visible`: the first packed token that a query sees and the one after the last, [batch, query heads, seq]; None: all.
    """
    heads, (batch, _, seq, _) = layer.heads, queries[0].shape
    rows, backend = _rows(heads[0], queries[0], layer.backend)
    bundles = len(heads[0].widths)
    if backend.attention is None or bundles != len(heads[1].widths):
        return None
    asking = [(one, _rows(one, q, layer.backend)[0]) for one, q in zip(heads, queries, strict=False)]
    projected = [one.queries(x, backend) for one, x in asking]
    constant, turned = sum((_constant(*one) for one in asking[1:]), _constant(*asking[0])), None
    for one, x in asking:
        if one.rotated_mean is not None:  # one of them at most: what is rotated
            turned = one.rotated_mean.logit_factors(x, layer.starts(0, layer.blocks)).bundled(bundles)
    seen = None if visible is None else (visible[0].reshape(batch, bundles, -1), visible[1].reshape(batch, bundles, -1))
    constant, exact = constant.view(batch, bundles, -1), layer.states_dtype == torch.float32
    keys, values = ([chunk.slot(slot) for chunk in layer.chunks] for slot in (0, 1))
    top, total, sums = backend.attention(
        PackedStorage(keys, values, (heads[0].widths, heads[1].widths)),
        AttentionQueries(projected[0], constant, projected[1] if projected[1:] else None, turned, seen, softcap, exact),
    )
    summed = heads[0 if projected[1:] else 1]
    found = torch.addcmul(summed.expanded(sums, backend), summed.offset[:, None], total.view(batch, -1, rows.shape[2], 1))
    return PartialAttention(*(x.reshape(batch, -1, seq, x.shape[-1]) for x in (top[..., None], total[..., None], found)))


def block_logits(layer: CompressedLayer, slot: int, q: Tensor) -> Tensor:
    """q · k̂ [batch, query heads, seq, tokens] of what is packed in a slot, keys' means and their turning included."""
    heads = layer.heads[slot]
    rows, backend = _rows(heads, q, layer.backend)
    projected = heads.queries(rows, backend)
    found = [backend.logits(chunk.slot(slot), heads.widths, projected) for chunk in layer.chunks]
    logits = (found[0] if len(found) == 1 else torch.cat(found, -1)).view(*rows.shape[:3], -1)
    logits = logits.add_(_constant(heads, rows))
    if heads.rotated_mean is not None:
        logits = logits.add_(heads.rotated_mean.logits(rows, layer.starts(0, layer.blocks)))
    return logits.view(*q.shape[:3], -1)


def block_sums(layer: CompressedLayer, slot: int, weights: Tensor) -> Tensor:
    """Σ a x̂ [batch, query heads, seq, dim] of what is packed in a slot, of values or latents."""
    heads = layer.heads[slot]
    rows, backend = _rows(heads, weights, layer.backend)
    bundled = rows.reshape(len(rows), len(heads.widths), -1, rows.shape[3])
    parts = bundled.split([BLOCK * chunk.filled for chunk in layer.chunks], -1)
    sums = [backend.sums(chunk.slot(slot), heads.widths, part) for chunk, part in zip(layer.chunks, parts, strict=True)]
    found = heads.expanded(sum(sums[1:], sums[0]), backend) + heads.offset[:, None] * rows.sum(-1, keepdim=True)
    return found.view(*weights.shape[:3], -1)


def _rows(heads: PackedHeads, x: Tensor, backend: BackendName | None) -> tuple[Tensor, PackedBackend]:
    """x [batch, query heads, seq, n] with what belongs to a KV head side by side, and what reads blocks for so many rows."""
    rows = x.reshape(len(x), len(heads.mean), -1, x.shape[3])
    return rows, packed_backend(x, rows.shape[2] * len(heads.mean) // len(heads.widths), backend)


def _constant(heads: PackedHeads, rows: Tensor) -> Tensor:
    """What every token's logit has in common [batch, KV heads, rows, 1]."""
    return rows @ heads.offset[..., None]
