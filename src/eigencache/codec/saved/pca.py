"""Saving a `PCACodec`: transforms that groups share are stored once and shared again after loading."""

from dataclasses import fields
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, NonNegativeInt, PositiveInt
from torch import Tensor

from eigencache.codec.pca import PCACodec, PCAGroup
from eigencache.codec.saved.card import CardPart, CodecCard, Count32
from eigencache.codec.saved.layouts import (
    card_parts,
    card_rotations,
    frequencies_of,
    frequency_kinds,
    layout_fault,
    parts_from,
    rotations_from,
)
from eigencache.codec.saved.registry import Fault, SavedKind, TensorKind, Tensors, saved_codec
from eigencache.records.base import Centered, Record, Scope
from eigencache.spectral.transform import Transform

_FIELDS = tuple(field.name for field in fields(Transform))


class PCACardSettings(Record):
    """What is compressed, and how its bases were fitted."""

    target: str
    scope: Scope
    frame: Literal["pre", "post"]  # of the keys
    metric: str
    alpha: float  # power of the metric
    centered: Centered
    basis: str
    bits: Literal[16, 8, 4]  # of a stored coefficient
    rank: PositiveInt  # largest number of coefficients of a group
    sinks: Count32 = 0  # first tokens in 16 bits


class CardGroup(Record):
    """The parts that one transform works on; groups with the same transform index share it."""

    transform: NonNegativeInt
    rank: PositiveInt
    parts: Annotated[list[CardPart], Field(min_length=1)]

    @property
    def width(self) -> int:
        """Numbers per token of all parts."""
        return sum(part.width for part in self.parts)


class PCACard(CodecCard):
    """The card of a `PCACodec`."""

    kind: Literal["pca"] = "pca"  # type: ignore[assignment]
    settings: PCACardSettings
    sinks: Count32 = 0
    groups: Annotated[list[CardGroup], Field(min_length=1)]


@saved_codec("pca")
class SavedPCA(SavedKind):
    """One tensor per field of every transform, and the frequencies of every rotation."""

    codec, card = PCACodec, PCACard

    def entries(self, codec: PCACodec) -> dict[str, Any]:
        """Return groups, rotations and sinks as fields of the card."""
        groups = [
            CardGroup(transform=i, rank=group.transform.rank, parts=card_parts(group.parts))
            for i, group in zip(_indices(codec), codec.groups, strict=True)
        ]
        return {"groups": groups, "rotations": card_rotations(codec.rotations), "sinks": codec.sinks}

    def tensors(self, codec: PCACodec) -> dict[str, Tensor]:
        """Return every transform once, and the frequencies of every rotation."""
        transforms = {index: group.transform for index, group in zip(_indices(codec), codec.groups, strict=True)}
        tensors = {
            f"transform.{i}.{field}": getattr(transform, field) for i, transform in transforms.items() for field in _FIELDS
        }
        return tensors | frequencies_of(codec.rotations)

    def card_fault(self, card: PCACard) -> Fault:
        """Return how the card contradicts itself, or None."""
        if fault := layout_fault([part for group in card.groups for part in group.parts], card.rotations):
            return fault
        if card.sinks != card.settings.sinks:
            return f"`sinks` is {card.sinks}, its settings say {card.settings.sinks}"
        sizes: dict[int, tuple[int, int]] = {}
        for group in card.groups:
            if group.rank > group.width:
                return f"transform {group.transform} has rank {group.rank} in {group.width} dimensions"
            if sizes.setdefault(group.transform, (group.width, group.rank)) != (group.width, group.rank):
                return f"groups of several widths or ranks share transform {group.transform}"
        return None

    def tensor_kinds(self, card: PCACard) -> dict[str, TensorKind]:
        """Return dtype and shape of every tensor that the card implies."""
        kinds: dict[str, TensorKind] = {}
        for group in card.groups:
            width, rank = group.width, group.rank
            shapes = {"mean": (width,), "encoder": (width, rank), "decoder": (rank, width), "spectrum": (width,)}
            kinds |= {f"transform.{group.transform}.{field}": (torch.float32, shape) for field, shape in shapes.items()}
        return kinds | frequency_kinds(card.rotations)

    def codec_from(self, card: PCACard, tensors: Tensors) -> PCACodec:
        """Return the codec."""
        transforms = {
            i: Transform(**{field: tensors[f"transform.{i}.{field}"] for field in _FIELDS})
            for i in dict.fromkeys(group.transform for group in card.groups)
        }
        groups = tuple(PCAGroup(parts_from(group.parts), transforms[group.transform]) for group in card.groups)
        dtype = getattr(torch, card.origin.dtype)
        return PCACodec(card.name, groups, rotations_from(card.rotations, tensors), dtype, card.settings.bits, card.sinks)

    def payload_nbytes(self, codec: PCACodec, tokens: int, values_per_token: int, coded_bits: float | None) -> int:
        """Return the bytes of one sequence; they do not depend on the text."""
        covered = sum(group.transform.width for group in codec.groups)
        return codec.payload_nbytes(tokens, values_per_token - covered)


def _indices(codec: PCACodec) -> list[int]:
    """Return the index of each group's transform; groups that share one have the same index."""
    numbers: dict[int, int] = {}
    return [numbers.setdefault(id(group.transform), len(numbers)) for group in codec.groups]
