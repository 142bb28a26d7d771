"""A PCA codec as a card's entries and named tensors, and back: what is shared is stored once and shared again."""

from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from eigencache.codec.pca import PCACodec, PCAGroup
from eigencache.codec.saved.card import CardGroup, PCACard
from eigencache.codec.saved.kind import (
    Fault,
    Kind,
    TensorKind,
    Tensors,
    card_parts,
    card_rotations,
    frequencies_of,
    frequency_kinds,
    layout_fault,
    nothing,
    parts_from,
    rotations_from,
)
from eigencache.spectral.transform import Transform

_FIELDS = tuple(field.name for field in fields(Transform))


def _entries_of(codec: PCACodec) -> dict[str, Any]:
    groups = [
        CardGroup(transform=i, rank=group.transform.rank, parts=card_parts(group.parts))
        for i, group in zip(_indices(codec), codec.groups, strict=True)
    ]
    return {"groups": groups, "rotations": card_rotations(codec.rotations), "sinks": codec.sinks}


def _tensors_of(codec: PCACodec) -> dict[str, Tensor]:
    """Every transform once, and the frequencies of every rotation."""
    transforms = {index: group.transform for index, group in zip(_indices(codec), codec.groups, strict=True)}
    tensors = {f"transform.{i}.{field}": getattr(one, field) for i, one in transforms.items() for field in _FIELDS}
    return tensors | frequencies_of(codec.rotations)


def _card_fault(card: PCACard) -> Fault:
    if fault := layout_fault([part for group in card.groups for part in group.parts], card.rotations):
        return fault
    if card.sinks != card.settings.sinks:
        return f"it keeps {card.sinks} first tokens, its settings say {card.settings.sinks}"
    sizes: dict[int, tuple[int, int]] = {}
    for group in card.groups:
        if group.rank > group.width:
            return f"transform {group.transform} has rank {group.rank} in {group.width} dimensions"
        if sizes.setdefault(group.transform, (group.width, group.rank)) != (group.width, group.rank):
            return f"groups of several widths or ranks share transform {group.transform}"
    return None


def _tensor_kinds(card: PCACard) -> dict[str, TensorKind]:
    kinds: dict[str, TensorKind] = {}
    for group in card.groups:
        width, rank = group.width, group.rank
        shapes = {"mean": (width,), "encoder": (width, rank), "decoder": (rank, width), "spectrum": (width,)}
        kinds |= {f"transform.{group.transform}.{field}": (torch.float32, shape) for field, shape in shapes.items()}
    return kinds | frequency_kinds(card.rotations)


def _codec_from(card: PCACard, tensors: Tensors) -> PCACodec:
    transforms = {
        i: Transform(**{field: tensors[f"transform.{i}.{field}"] for field in _FIELDS})
        for i in dict.fromkeys(group.transform for group in card.groups)
    }
    groups = tuple(PCAGroup(parts_from(group.parts), transforms[group.transform]) for group in card.groups)
    dtype = getattr(torch, card.origin.dtype)
    return PCACodec(card.name, groups, rotations_from(card.rotations, tensors), dtype, card.settings.bits, card.sinks)


def _indices(codec: PCACodec) -> list[int]:
    """The number of each group's transform; groups that share one have the same."""
    numbers: dict[int, int] = {}
    return [numbers.setdefault(id(group.transform), len(numbers)) for group in codec.groups]


KIND = Kind(
    PCACodec, PCACard, _entries_of, _tensors_of, _card_fault, _tensor_kinds, nothing, _codec_from, codec_fault=nothing
)
