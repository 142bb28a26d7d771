"""Attention to the packed blocks of a layer: at once where a kernel does that, or logits and weighed sums apart."""

from dataclasses import dataclass

import torch
from torch import Tensor

from eigencache.codec.packed import PackedHeads
from eigencache.kernels.packed import PackedBackend, packed_backend
from eigencache.kernels.reference import BLOCK
from eigencache.models.compressed_layer import CompressedLayer


@dataclass(frozen=True)
class Partial:
    """Attention over some tokens: the largest logit, weights relative to it added up, and what they weigh.

    `top` and `total` [batch, query heads, seq, 1], `sums` [batch, query heads, seq, dim of values], float32.
    """

    top: Tensor
    total: Tensor
    sums: Tensor


def block_attention(layer: CompressedLayer, q: Tensor) -> Partial | None:
    """Of queries [batch, query heads, seq, dim] that see all blocks; None where no kernel does it at once."""
    keys, values = layer.heads
    rows, backend = _rows(keys, q)
    if backend.attention is None or len(keys.widths) != len(values.widths):
        return None
    chunks = [[chunk.slot(slot) for chunk in layer.chunks] for slot in (0, 1)]
    turned = None
    if keys.turning is not None:
        turned = keys.turning.turned(rows, layer.starts(0, layer.blocks).to(rows.device)).bundled(len(keys.widths))
    widths, exact = (keys.widths, values.widths), layer.dtype == torch.float32
    top, total, sums = backend.attention(chunks[0], chunks[1], widths, keys.queries(rows, backend), turned, exact)
    top, total = (x.view(*rows.shape[:3], 1) for x in (top, total))
    found = values.expanded(sums, backend) + values.offset[:, None] * total
    return Partial(*(x.unflatten(2, (-1, q.shape[2])).flatten(1, 2) for x in (top + _constant(keys, rows), total, found)))


def block_logits(layer: CompressedLayer, slot: int, q: Tensor) -> Tensor:
    """q · k̂ [batch, query heads, seq, tokens] of what is packed in a slot, keys' means and their turning included."""
    heads = layer.heads[slot]
    rows, backend = _rows(heads, q)
    projected = heads.queries(rows, backend)
    found = [backend.logits(chunk.slot(slot), heads.widths, projected) for chunk in layer.chunks]
    logits = (found[0] if len(found) == 1 else torch.cat(found, -1)).unflatten(2, (-1, rows.shape[2])).flatten(1, 2)
    logits = logits.add_(_constant(heads, rows))
    if heads.turning is not None:
        logits = logits.add_(heads.turning.logits(rows, layer.starts(0, layer.blocks).to(rows.device)))
    return logits.unflatten(2, (-1, q.shape[2])).flatten(1, 2)


def block_sums(layer: CompressedLayer, slot: int, weights: Tensor) -> Tensor:
    """Σ a x̂ [batch, query heads, seq, dim] of what is packed in a slot, of values or latents."""
    heads = layer.heads[slot]
    rows, backend = _rows(heads, weights)
    bundled = rows.unflatten(1, (len(heads.widths), -1)).flatten(2, 3)
    parts = bundled.split([BLOCK * chunk.filled for chunk in layer.chunks], -1)
    sums = [backend.sums(chunk.slot(slot), heads.widths, part) for chunk, part in zip(layer.chunks, parts, strict=True)]
    found = heads.expanded(sum(sums[1:], sums[0]), backend) + heads.offset[:, None] * rows.sum(-1, keepdim=True)
    return found.unflatten(2, (-1, weights.shape[2])).flatten(1, 2)


def _rows(heads: PackedHeads, x: Tensor) -> tuple[Tensor, PackedBackend]:
    """x [batch, query heads, seq, n] with what belongs to a KV head side by side, and what reads blocks for so many rows."""
    rows = x.unflatten(1, (len(heads.mean), -1)).flatten(2, 3)
    return rows, packed_backend(x, rows.shape[2] * len(heads.mean) // len(heads.widths))


def _constant(heads: PackedHeads, rows: Tensor) -> Tensor:
    """What every token's logit has in common [batch, KV heads, rows, 1]."""
    return (rows * heads.offset[:, None]).sum(-1, keepdim=True)
