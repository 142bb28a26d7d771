"""How the numbers of a cache form one vector per token, with keys before rotation.

A `Layout` concatenates parts of the slots of layers. Undoing a rotation is exact and needs the positions of the tokens,
which follow from that of the first one (THEORY 1).
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from eigencache.codec.base import Cached, length_of
from eigencache.errors import CodecError
from eigencache.spectral.rope import Angles, Rotation, rotate, unrotate

Rotations = Mapping[int, tuple[int, Rotation]]  # layer_idx → the slot that a layout holds before rotation, and its rotation
Slots = dict[tuple[int, int], Tensor]  # (layer_idx, slot) → [batch, heads, seq, dim]


@dataclass(frozen=True)
class Part:
    """Some heads of one slot of one layer, which are neighbors in a token's vector."""

    layer_idx: int
    slot: int  # 0 or 1: `keys` or `values` of a transformers cache layer
    heads: tuple[int, int]  # half-open range
    dim: int  # width of one head

    @property
    def width(self) -> int:
        """Numbers per token."""
        return (self.heads[1] - self.heads[0]) * self.dim


@dataclass(frozen=True, eq=False)
class Layout:
    """The parts of a token's vector, in order, and the rotations that are undone in them."""

    parts: tuple[Part, ...]
    rotations: Rotations

    @property
    def width(self) -> int:
        """Numbers of a token's vector."""
        return sum(part.width for part in self.parts)

    @property
    def head_widths(self) -> list[int]:
        """Width of every head of a vector, in order."""
        return [part.dim for part in self.parts for _ in range(*part.heads)]

    @property
    def spans(self) -> list[tuple[int, int]]:
        """Columns of every part as half-open ranges."""
        return list(pairwise([0, *accumulate(part.width for part in self.parts)]))

    @property
    def layer_ends(self) -> set[int]:
        """Columns that part whole layers from others, and the width."""
        layers = [part.layer_idx for part in self.parts]
        return {stop for n, (_, stop) in enumerate(self.spans, 1) if not {*layers[:n]} & {*layers[n:]}}

    def within(self, start: int, stop: int) -> "Layout":
        """Return the layout of the columns start … stop − 1, which must be whole layers."""
        parts = [part for part, (a, b) in zip(self.parts, self.spans, strict=True) if start <= a and b <= stop]
        layers = {part.layer_idx for part in parts}
        return Layout(tuple(parts), {i: rotation for i, rotation in self.rotations.items() if i in layers})

    def vectors(self, cached: Cached, start: int, mean: Tensor | None = None) -> Tensor:
        """Return the vectors of a cache.

        Args:
            cached: Layer → both slots [batch, heads, seq, dim]. A layer with fewer tokens than the others (a sliding
                window) holds the last ones.
            start: Position of the first token.
            mean: Vector [width] that replaces what such a layer lacks; None: no layer may lack tokens.

        Returns:
            Vectors [batch, seq, width] in float32.

        Raises:
            CodecError: The cache has other shapes than the layout, or a layer lacks tokens and `mean` is None.
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
                    raise CodecError(f"layer {part.layer_idx} holds {x.shape[2]} tokens, other layers hold {tokens}")
                columns[:, :missing] = mean[first:stop]
            columns[:, missing:].unflatten(-1, (-1, part.dim)).copy_(x.transpose(1, 2))
        return vectors

    def slots(self, vectors: Tensor, start: int, angles_at: "LastAngles | None" = None) -> Slots:
        """Return the slots of vectors [batch, seq, width], keys rotated: the inverse of `vectors`.

        `angles_at` is shared by calls for the same tokens, whose angles are computed once.
        """
        columns = vectors.split([part.width for part in self.parts], -1)
        return rotated(slots_of(zip(self.parts, columns, strict=True)), self.rotations, start, angles_at)

    def require_all(self, cached: Cached) -> None:
        """Raise `CodecError` unless the cache holds exactly the heads of the layout: other heads would be lost."""
        expected: dict[tuple[int, int], tuple[int, int]] = {}
        for part in sorted(self.parts, key=lambda part: part.heads):
            expected[part.layer_idx, part.slot] = (part.heads[1], part.dim)
        actual = {(i, slot): (x.shape[1], x.shape[3]) for i, both in cached.items() for slot, x in enumerate(both)}
        if other := sorted({layer_idx for (layer_idx, _), _ in expected.items() ^ actual.items()}):
            raise CodecError(f"the cache has other heads in layers {other}: this codec was fitted on another model")


def unrotated(cached: Cached, rotations: Rotations, start: int, tokens: int | None = None) -> Slots:
    """Return every slot of a cache, those in `rotations` before rotation and in float32.

    Args:
        cached: Layer → both slots [batch, heads, seq, dim].
        rotations: Which slots to rotate back.
        start: Position of the first token.
        tokens: Tokens of the stretch, of which a layer may hold the last ones only; default: every layer holds all.

    Raises:
        CodecError: The cache lacks a layer of `rotations`.
    """
    slots = {(i, slot): x for i, both in cached.items() for slot, x in enumerate(both)}
    angles_at = LastAngles()
    for layer_idx, (slot, rotation) in rotations.items():
        if (layer_idx, slot) not in slots:
            raise CodecError(f"the cache has no layer {layer_idx}: this codec was fitted on another model")
        x = slots[layer_idx, slot]
        first = start + (x.shape[2] if tokens is None else tokens) - x.shape[2]
        angles = angles_at.of(rotation, range(first, first + x.shape[2])).to(x.device)
        slots[layer_idx, slot] = unrotate(x.float(), angles, rotation.pairing)
    return slots


def rotated(slots: Slots, rotations: Rotations, start: int, angles_at: "LastAngles | None" = None) -> Slots:
    """Return the slots with those in `rotations` rotated to positions `start`, `start` + 1, and so on."""
    result, angles_at = dict(slots), angles_at or LastAngles()
    for layer_idx, (slot, rotation) in rotations.items():
        x = slots[layer_idx, slot]
        angles = angles_at.of(rotation, range(start, start + x.shape[2])).to(x.device)
        result[layer_idx, slot] = rotate(x, angles, rotation.pairing)
    return result


def columns_of(slots: Slots, part: Part) -> Tensor:
    """Return the numbers [batch, seq, width] of one part. Raises `CodecError` where the cache has no such heads."""
    return heads_of(slots, part).transpose(1, 2).flatten(2)


def heads_of(slots: Slots, part: Part) -> Tensor:
    """Return the heads [batch, heads, seq, dim] of one part. Raises `CodecError` where the cache has no such heads."""
    x = slots.get((part.layer_idx, part.slot))
    if x is None or x.shape[1] < part.heads[1] or x.shape[-1] != part.dim:
        raise CodecError(f"the cache has no {part}: this codec was fitted on another model")
    return x[:, part.heads[0] : part.heads[1]]


def slots_of(columns: Iterable[tuple[Part, Tensor]]) -> Slots:
    """Return the slots of parts and their columns [batch, seq, width], heads in ascending order."""
    by_slot: dict[tuple[int, int], list[tuple[int, Tensor]]] = {}
    for part, x in columns:
        heads = x.unflatten(-1, (-1, part.dim)).transpose(1, 2)
        by_slot.setdefault((part.layer_idx, part.slot), []).append((part.heads[0], heads))
    return {key: torch.cat([x for _, x in sorted(parts, key=lambda p: p[0])], 1) for key, parts in by_slot.items()}


class LastAngles:
    """Caches the last angles: layers mostly share them, and cos and sin in float64 are slow."""

    def __init__(self) -> None:
        self._last: tuple[Rotation, range, Angles] | None = None

    def of(self, rotation: Rotation, positions: range) -> Angles:
        """Return `rotation.angles` at `positions`."""
        if self._last is None or self._last[1] != positions or not _same(self._last[0], rotation):
            angles = rotation.angles(torch.arange(positions.start, positions.stop))
            self._last = rotation, positions, angles
        return self._last[2]


def _same(a: Rotation, b: Rotation) -> bool:
    """Return whether both rotations have the same angles; their pairing may differ."""
    if a.frequencies.device != b.frequencies.device:
        return False
    return a.scale == b.scale and torch.equal(a.frequencies, b.frequencies)


def by_layer(slots: Slots, dtype: torch.dtype) -> dict[int, tuple[Tensor, Tensor]]:
    """Return both slots of every layer in `dtype`, layers ascending."""
    layers = dict.fromkeys(layer_idx for layer_idx, _ in sorted(slots))
    return {i: (slots[i, 0].to(dtype), slots[i, 1].to(dtype)) for i in layers}
