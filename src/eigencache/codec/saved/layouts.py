"""Parts and rotations of a layout as entries of a card and as named tensors, and back."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict

import torch
from torch import Tensor

from eigencache.codec.layout import Part, Rotations
from eigencache.codec.saved.card import CardPart, CardRotation
from eigencache.codec.saved.registry import Fault, TensorKind, Tensors
from eigencache.spectral.rope import Rotation


def card_parts(parts: Iterable[Part]) -> list[CardPart]:
    """Return parts as entries of a card."""
    return [CardPart(**asdict(part)) for part in parts]


def parts_from(parts: Iterable[CardPart]) -> tuple[Part, ...]:
    """Return the parts of entries."""
    return tuple(Part(**part.model_dump()) for part in parts)


def card_rotations(rotations: Rotations) -> list[CardRotation]:
    """Return rotations, without their frequencies, as entries of a card."""
    return [
        CardRotation(layer_idx=i, slot=slot, pairs=len(r.frequencies), scale=r.scale, pairing=r.pairing)  # type: ignore[arg-type]
        for i, (slot, r) in rotations.items()
    ]


def frequencies_of(rotations: Rotations) -> dict[str, Tensor]:
    """Return the frequencies of rotations as named tensors."""
    return {_frequencies(i, slot): rotation.frequencies for i, (slot, rotation) in rotations.items()}


def frequency_kinds(rotations: Iterable[CardRotation]) -> dict[str, TensorKind]:
    """Return dtype and shape of the frequencies of a card's rotations."""
    return {_frequencies(r.layer_idx, r.slot): (torch.float64, (r.pairs,)) for r in rotations}


def rotations_from(rotations: Iterable[CardRotation], tensors: Tensors) -> Rotations:
    """Return the rotations of entries and tensors."""
    return {
        r.layer_idx: (int(r.slot), Rotation(tensors[_frequencies(r.layer_idx, r.slot)], r.scale, r.pairing))
        for r in rotations
    }


def layout_fault(parts: Sequence[CardPart], rotations: Sequence[CardRotation]) -> Fault:
    """Return which heads are missing or repeated, or which rotation has no such slot, or None."""
    spans: dict[tuple[int, int], list[CardPart]] = {}
    for part in parts:
        spans.setdefault((part.layer_idx, part.slot), []).append(part)
    for (layer_idx, slot), members in spans.items():
        members.sort(key=lambda part: part.heads)
        edges = [0, *(part.heads[1] for part in members)]
        if (
            [part.heads[0] for part in members] != edges[:-1]
            or edges != sorted(set(edges))
            or len({p.dim for p in members}) > 1
        ):
            return f"the parts do not cover the heads of layer {layer_idx}, slot {slot} once each"
    if len({rotation.layer_idx for rotation in rotations}) < len(rotations):
        return "a layer is rotated twice"
    for rotation in rotations:
        slot_parts = spans.get((rotation.layer_idx, rotation.slot))
        if slot_parts is None or 2 * rotation.pairs > slot_parts[0].dim:
            return f"layer {rotation.layer_idx}, slot {rotation.slot} has no {rotation.pairs} pairs to rotate"
    return None


def _frequencies(layer_idx: int, slot: int) -> str:
    return f"rotation.{layer_idx}.{slot}.frequencies"
