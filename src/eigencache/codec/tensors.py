"""A PCA codec as a card's entries and named tensors, and back: what is shared is stored once and shared again."""

from dataclasses import asdict, fields

import torch
from torch import Tensor

from eigencache.codec.card import CardGroup, CardPart, CardRotation, CodecCard
from eigencache.codec.pca import Group, Part, PCACodec
from eigencache.spectral.rope import Rotation
from eigencache.spectral.transform import Transform

WINDOWS = "calibration.windows"
_FIELDS = tuple(field.name for field in fields(Transform))
_Kind = tuple[torch.dtype, tuple[int, ...]]


def tensors_of(codec: PCACodec) -> dict[str, Tensor]:
    """Every transform once, and the frequencies of every rotation, each in a storage of its own."""
    transforms = {index: group.transform for index, group in zip(_indices(codec), codec.groups, strict=True)}
    tensors = {f"transform.{i}.{field}": getattr(one, field) for i, one in transforms.items() for field in _FIELDS}
    tensors |= {_frequencies(i, slot): rotation.frequencies for i, (slot, rotation) in codec.rotations.items()}
    return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}


def card_groups(codec: PCACodec) -> list[CardGroup]:
    """What the transforms work on."""
    return [
        CardGroup(transform=i, rank=group.transform.rank, parts=[CardPart(**asdict(part)) for part in group.parts])
        for i, group in zip(_indices(codec), codec.groups, strict=True)
    ]


def card_rotations(codec: PCACodec) -> list[CardRotation]:
    """The rotations without their frequencies."""
    return [
        CardRotation(layer_idx=i, slot=slot, pairs=len(r.frequencies), scale=r.scale, pairing=r.pairing)  # type: ignore[arg-type]
        for i, (slot, r) in codec.rotations.items()
    ]


def codec_from(card: CodecCard, tensors: dict[str, Tensor]) -> PCACodec:
    """The codec again, of a card and tensors that have no fault; every tensor is copied, so that none lies unaligned."""
    transforms = {
        i: Transform(**{field: tensors[f"transform.{i}.{field}"].clone() for field in _FIELDS})
        for i in dict.fromkeys(group.transform for group in card.groups)
    }
    groups = tuple(
        Group(tuple(Part(**part.model_dump()) for part in group.parts), transforms[group.transform]) for group in card.groups
    )
    rotations = {
        r.layer_idx: (int(r.slot), Rotation(tensors[_frequencies(r.layer_idx, r.slot)].clone(), r.scale, r.pairing))
        for r in card.rotations
    }
    return PCACodec(card.name, groups, rotations, getattr(torch, card.origin.dtype), card.settings.bits)


def card_fault(card: CodecCard) -> str | None:
    """What of a card does not fit together: heads that are missing or doubled, rotations of what is not compressed."""
    spans: dict[tuple[int, int], list[CardPart]] = {}
    for part in (part for group in card.groups for part in group.parts):
        spans.setdefault((part.layer_idx, part.slot), []).append(part)
    for (layer_idx, slot), parts in spans.items():
        parts.sort(key=lambda part: part.heads)
        edges = [0, *(part.heads[1] for part in parts)]
        if [part.heads[0] for part in parts] != edges[:-1] or edges != sorted(set(edges)) or len({p.dim for p in parts}) > 1:
            return f"the groups do not cover the heads of layer {layer_idx}, slot {slot} once each"
    if len({rotation.layer_idx for rotation in card.rotations}) < len(card.rotations):
        return "a layer is rotated twice"
    for rotation in card.rotations:
        parts = spans.get((rotation.layer_idx, rotation.slot))
        if parts is None or 2 * rotation.pairs > parts[0].dim:
            return f"layer {rotation.layer_idx}, slot {rotation.slot} has no {rotation.pairs} pairs that could be rotated"
    sizes: dict[int, tuple[int, int]] = {}
    for group in card.groups:
        if group.rank > group.width:
            return f"transform {group.transform} has rank {group.rank} in {group.width} dimensions"
        if sizes.setdefault(group.transform, (group.width, group.rank)) != (group.width, group.rank):
            return f"groups of several widths or ranks share transform {group.transform}"
    return None


def tensor_fault(card: CodecCard, tensors: dict[str, Tensor]) -> str | None:
    """The first tensor that is missing, unknown, of another dtype or shape than the card says, or not finite."""
    expected = _expected(card)
    if missing := sorted(expected.keys() - tensors.keys()):
        return f"tensor {missing[0]} is missing"
    if unknown := sorted(tensors.keys() - expected.keys()):
        return f"tensor {unknown[0]} is not of this codec"
    for name, kind in expected.items():
        found = tensors[name].dtype, tuple(tensors[name].shape)
        if found != kind:
            return f"tensor {name} is {found[0]} {list(found[1])}, the card says {kind[0]} {list(kind[1])}"
        if not tensors[name].isfinite().all():
            return f"tensor {name} holds NaN or infinite values"
    return None


def _expected(card: CodecCard) -> dict[str, _Kind]:
    expected: dict[str, _Kind] = {WINDOWS: (torch.int64, (card.windows,))}
    for group in card.groups:
        width, rank = group.width, group.rank
        shapes = {"mean": (width,), "encoder": (width, rank), "decoder": (rank, width), "spectrum": (width,)}
        expected |= {f"transform.{group.transform}.{field}": (torch.float32, shape) for field, shape in shapes.items()}
    return expected | {_frequencies(r.layer_idx, r.slot): (torch.float64, (r.pairs,)) for r in card.rotations}


def _indices(codec: PCACodec) -> list[int]:
    """The number of each group's transform; groups that share one have the same."""
    numbers: dict[int, int] = {}
    return [numbers.setdefault(id(group.transform), len(numbers)) for group in codec.groups]


def _frequencies(layer_idx: int, slot: int) -> str:
    return f"rotation.{layer_idx}.{slot}.frequencies"
