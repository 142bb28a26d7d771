"""Which numbers of a cache stand side by side in a token's vector: keys are brought before rotation and back, exactly.

A `Layout` names parts of layers' slots one after the other; a rotation undone needs the tokens' positions, which follow
from the first one (THEORY 1).
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from eigencache.codec.base import Cached, length_of
from eigencache.errors import CodecError
from eigencache.spectral.rope import Angles, Rotation, rotate, unrotate

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

    @property
    def spans(self) -> list[tuple[int, int]]:
        """From and up to which column every part stands."""
        return list(pairwise([0, *accumulate(part.width for part in self.parts)]))

    def vectors(self, cached: Cached, start: int, mean: Tensor | None = None) -> Tensor:
        """Vectors [batch, seq, width] in float32 of positions start, start + 1, …

        A layer that holds fewer tokens than the others (a sliding window) holds the last ones; the earlier are filled
        from `mean` [width]. Raises `CodecError` for a cache of other shapes, and for such a layer without `mean`.
        """
        tokens = length_of(cached)
        slots = unrotated(cached, self.rotations, start, tokens)
        some = next(iter(slots.values()))
        vectors = torch.empty(len(some), tokens, self.width, device=some.device)
        for part, (first, stop) in zip(self.parts, self.spans, strict=True):
            x = heads_of(slots, part)
            columns, missing = vectors[..., first:stop], tokens - x.shape[2]
            if missing:
                if mean is None:
                    raise CodecError(f"layer {part.layer_idx} holds {x.shape[2]} tokens, others {tokens}")
                columns[:, :missing] = mean[first:stop]
            columns[:, missing:].unflatten(-1, (-1, part.dim)).copy_(x.transpose(1, 2))
        return vectors

    def slots(self, vectors: Tensor, start: int) -> Slots:
        """The slots again, keys rotated: the inverse of `vectors`."""
        columns = vectors.split([part.width for part in self.parts], -1)
        return rotated(slots_of(zip(self.parts, columns, strict=True)), self.rotations, start)

    def require_all(self, cached: Cached) -> None:
        """Raises `CodecError` unless the cache holds these heads and no others: what no part names would be lost."""
        own: dict[tuple[int, int], tuple[int, int]] = {}
        for part in sorted(self.parts, key=lambda part: part.heads):
            own[part.layer_idx, part.slot] = (part.heads[1], part.dim)
        held = {(i, slot): (x.shape[1], x.shape[3]) for i, both in cached.items() for slot, x in enumerate(both)}
        if other := sorted({layer_idx for (layer_idx, _), _ in own.items() ^ held.items()}):
            raise CodecError(f"layers {other}: the cache has other heads there, this codec was fitted on another model")


def unrotated(cached: Cached, rotations: Rotations, start: int, tokens: int | None = None) -> Slots:
    """Every slot, those in `rotations` before rotation, in float32. Of `tokens` a layer may hold the last ones only."""
    slots = {(i, slot): x for i, both in cached.items() for slot, x in enumerate(both)}
    known = _Angles()
    for layer_idx, (slot, rotation) in rotations.items():
        if (layer_idx, slot) not in slots:
            raise CodecError(f"the cache has no layer {layer_idx}: this codec was fitted on another model")
        x = slots[layer_idx, slot]
        first = start + (x.shape[2] if tokens is None else tokens) - x.shape[2]
        angles = known.of(rotation, range(first, first + x.shape[2])).to(x.device)
        slots[layer_idx, slot] = unrotate(x.float(), angles, rotation.pairing)
    return slots


def rotated(slots: Slots, rotations: Rotations, start: int) -> Slots:
    """The slots in `rotations` rotated to positions start, start + 1, …, the others as they are."""
    turned, known = dict(slots), _Angles()
    for layer_idx, (slot, rotation) in rotations.items():
        x = slots[layer_idx, slot]
        angles = known.of(rotation, range(start, start + x.shape[2])).to(x.device)
        turned[layer_idx, slot] = rotate(x, angles, rotation.pairing)
    return turned


def columns_of(slots: Slots, part: Part) -> Tensor:
    """The numbers of one part [batch, seq, width]. Raises `CodecError` where the cache has no such heads."""
    return heads_of(slots, part).transpose(1, 2).flatten(2)


def heads_of(slots: Slots, part: Part) -> Tensor:
    """The heads of one part [batch, heads, seq, dim]. Raises `CodecError` where the cache has no such heads."""
    x = slots.get((part.layer_idx, part.slot))
    if x is None or x.shape[1] < part.heads[1] or x.shape[-1] != part.dim:
        raise CodecError(f"the cache has no {part}: this codec was fitted on another model")
    return x[:, part.heads[0] : part.heads[1]]


def slots_of(columns: Iterable[tuple[Part, Tensor]]) -> Slots:
    """The slots that these columns [batch, seq, width] make, heads in their order."""
    found: dict[tuple[int, int], list[tuple[int, Tensor]]] = {}
    for part, x in columns:
        heads = x.unflatten(-1, (-1, part.dim)).transpose(1, 2)
        found.setdefault((part.layer_idx, part.slot), []).append((part.heads[0], heads))
    return {at: torch.cat([x for _, x in sorted(parts, key=lambda p: p[0])], 1) for at, parts in found.items()}


class _Angles:
    """The last angles that were asked for: layers mostly share them, and cos and sin in float64 are dear."""

    def __init__(self) -> None:
        self._last: tuple[Rotation, range, Angles] | None = None

    def of(self, rotation: Rotation, positions: range) -> Angles:
        """`rotation.angles` at `positions`."""
        if self._last is None or self._last[1] != positions or not _same(self._last[0], rotation):
            angles = rotation.angles(torch.arange(positions.start, positions.stop))
            self._last = rotation, positions, angles
        return self._last[2]


def _same(a: Rotation, b: Rotation) -> bool:
    """Whether both give the same angles; how numbers are paired is another matter."""
    if a.frequencies.device != b.frequencies.device:
        return False
    return a.scale == b.scale and torch.equal(a.frequencies, b.frequencies)


def by_layer(slots: Slots, dtype: torch.dtype) -> dict[int, tuple[Tensor, Tensor]]:
    """Both slots of every layer in `dtype`, layers ascending."""
    layers = dict.fromkeys(layer_idx for layer_idx, _ in sorted(slots))
    return {i: (slots[i, 0].to(dtype), slots[i, 1].to(dtype)) for i in layers}
