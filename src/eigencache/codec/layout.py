"""Which numbers of a cache stand side by side in a token's vector: keys are brought before rotation and back, exactly.

A `Layout` names parts of layers' slots one after the other; a rotation undone needs the tokens' positions, which follow
from the first one (THEORY 1).
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from eigencache.codec.base import Cached
from eigencache.errors import CodecError
from eigencache.spectral.rope import Rotation, rotate, unrotate

Rotations = Mapping[int, tuple[int, Rotation]]  # layer_idx → which slot is stored before rotation, and how it is rotated
Slots = dict[tuple[int, int], Tensor]  # (layer_idx, slot) → [batch, heads, seq, dim]


@dataclass(frozen=True)
class Part:
    """Some heads of one slot of one layer: the numbers that stand side by side in a transform's vectors."""

    layer_idx: int
    slot: int  # 0 or 1: `keys` or `values` of a transformers cache layer
    heads: tuple[int, int]  # from, up to
    dim: int  # numbers of one head

    @property
    def width(self) -> int:
        """Numbers per token."""
        return (self.heads[1] - self.heads[0]) * self.dim


@dataclass(frozen=True, eq=False)
class Layout:
    """The parts of a token's vector, one after the other, and the rotations that are undone in them."""

    parts: tuple[Part, ...]
    rotations: Rotations

    @property
    def width(self) -> int:
        """Numbers of a token's vector."""
        return sum(part.width for part in self.parts)

    def vectors(self, cached: Cached, start: int, mean: Tensor | None = None) -> Tensor:
        """Vectors [batch, seq, width] in float32 of positions start, start + 1, …

        A layer that holds fewer tokens than the others (a sliding window) holds the last ones; the earlier are filled
        from `mean` [width]. Raises `CodecError` for a cache of other shapes, and for such a layer without `mean`.
        """
        tokens = max(slots[0].shape[2] for slots in cached.values())
        slots = unrotated(cached, self.rotations, start, tokens)
        columns, at = [], 0
        for part in self.parts:
            x = columns_of(slots, part).float()
            missing = tokens - x.shape[1]
            if missing:
                if mean is None:
                    raise CodecError(f"layer {part.layer_idx} holds {x.shape[1]} tokens, others {tokens}")
                x = torch.cat([mean[at : at + part.width].to(x).expand(len(x), missing, -1), x], 1)
            columns.append(x)
            at += part.width
        return torch.cat(columns, -1)

    def slots(self, vectors: Tensor, start: int) -> Slots:
        """The slots again, keys rotated: the inverse of `vectors`."""
        columns = vectors.split([part.width for part in self.parts], -1)
        return rotated(slots_of(zip(self.parts, columns, strict=True)), self.rotations, start)


def unrotated(cached: Cached, rotations: Rotations, start: int, tokens: int | None = None) -> Slots:
    """Every slot, those in `rotations` before rotation, in float32. Of `tokens` a layer may hold the last ones only."""
    slots = {(i, slot): x for i, both in cached.items() for slot, x in enumerate(both)}
    for layer_idx, (slot, rotation) in rotations.items():
        if (layer_idx, slot) not in slots:
            raise CodecError(f"the cache has no layer {layer_idx}: this codec was fitted on another model")
        x = slots[layer_idx, slot]
        first = start + (x.shape[2] if tokens is None else tokens) - x.shape[2]
        angles = rotation.angles(torch.arange(first, first + x.shape[2])).to(x.device)
        slots[layer_idx, slot] = unrotate(x.float(), angles, rotation.pairing)
    return slots


def rotated(slots: Slots, rotations: Rotations, start: int) -> Slots:
    """The slots in `rotations` rotated to positions start, start + 1, …, the others as they are."""
    turned = dict(slots)
    for layer_idx, (slot, rotation) in rotations.items():
        x = slots[layer_idx, slot]
        angles = rotation.angles(torch.arange(start, start + x.shape[2])).to(x.device)
        turned[layer_idx, slot] = rotate(x, angles, rotation.pairing)
    return turned


def columns_of(slots: Slots, part: Part) -> Tensor:
    """The numbers of one part [batch, seq, width]. Raises `CodecError` where the cache has no such heads."""
    x = slots.get((part.layer_idx, part.slot))
    if x is None or x.shape[1] < part.heads[1] or x.shape[-1] != part.dim:
        raise CodecError(f"the cache has no {part}: this codec was fitted on another model")
    return x[:, part.heads[0] : part.heads[1]].transpose(1, 2).flatten(2)


def slots_of(columns: Iterable[tuple[Part, Tensor]]) -> Slots:
    """The slots that these columns [batch, seq, width] make, heads in their order."""
    found: dict[tuple[int, int], list[tuple[int, Tensor]]] = {}
    for part, x in columns:
        heads = x.unflatten(-1, (-1, part.dim)).transpose(1, 2)
        found.setdefault((part.layer_idx, part.slot), []).append((part.heads[0], heads))
    return {at: torch.cat([x for _, x in sorted(parts, key=lambda p: p[0])], 1) for at, parts in found.items()}


def by_layer(slots: Slots, dtype: torch.dtype) -> dict[int, tuple[Tensor, Tensor]]:
    """Both slots of every layer in `dtype`, layers ascending."""
    layers = dict.fromkeys(layer_idx for layer_idx, _ in sorted(slots))
    return {i: (slots[i, 0].to(dtype), slots[i, 1].to(dtype)) for i in layers}
