"""What saved codecs of every kind share: parts and rotations of a card, and the first tensor that is not as the card says.

A kind is one module that turns its codec into entries of a card and named tensors, and back; `folder.py` lists them.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from eigencache.codec.layout import Part, Rotations
from eigencache.codec.saved.card import CardPart, CardRotation, CodecCard
from eigencache.spectral.rope import Rotation

TensorKind = tuple[torch.dtype, tuple[int, ...]]
Tensors = Mapping[str, Tensor]
Fault = str | None  # what is wrong, in words that follow a file's name


@dataclass(frozen=True)
class Kind:
    """How codecs of one class are saved. What takes a card takes one without the faults that were looked for before."""

    codec: type
    card: type[CodecCard]
    entries_of: Callable[[Any], dict[str, Any]]  # codec → what its card says of it
    tensors_of: Callable[[Any], dict[str, Tensor]]
    card_fault: Callable[[Any], Fault]  # what of a card contradicts itself
    tensor_kinds: Callable[[Any], dict[str, TensorKind]]  # card → what tensors there are
    value_fault: Callable[[Any, Tensors], Fault]  # what of tensors of the right kinds is out of range
    codec_from: Callable[[Any, Tensors], Any]
    codec_fault: Callable[[Any, Any], Fault]  # card and the codec made of it


def nothing(*_: Any) -> None:
    """No fault."""


def card_parts(parts: Iterable[Part]) -> list[CardPart]:
    """Parts as a card says them."""
    return [CardPart(**asdict(part)) for part in parts]


def parts_from(parts: Iterable[CardPart]) -> tuple[Part, ...]:
    """The parts again."""
    return tuple(Part(**part.model_dump()) for part in parts)


def card_rotations(rotations: Rotations) -> list[CardRotation]:
    """The rotations without their frequencies."""
    return [
        CardRotation(layer_idx=i, slot=slot, pairs=len(r.frequencies), scale=r.scale, pairing=r.pairing)  # type: ignore[arg-type]
        for i, (slot, r) in rotations.items()
    ]


def frequencies_of(rotations: Rotations) -> dict[str, Tensor]:
    """The frequencies as named tensors."""
    return {_frequencies(i, slot): rotation.frequencies for i, (slot, rotation) in rotations.items()}


def frequency_kinds(rotations: Iterable[CardRotation]) -> dict[str, TensorKind]:
    """What tensors the rotations of a card have."""
    return {_frequencies(r.layer_idx, r.slot): (torch.float64, (r.pairs,)) for r in rotations}


def rotations_from(rotations: Iterable[CardRotation], tensors: Tensors) -> Rotations:
    """The rotations again."""
    return {
        r.layer_idx: (int(r.slot), Rotation(tensors[_frequencies(r.layer_idx, r.slot)], r.scale, r.pairing))
        for r in rotations
    }


def layout_fault(parts: Sequence[CardPart], rotations: Sequence[CardRotation]) -> Fault:
    """Heads that are missing or doubled, rotations of what is not compressed."""
    spans: dict[tuple[int, int], list[CardPart]] = {}
    for part in parts:
        spans.setdefault((part.layer_idx, part.slot), []).append(part)
    for (layer_idx, slot), found in spans.items():
        found.sort(key=lambda part: part.heads)
        edges = [0, *(part.heads[1] for part in found)]
        if [part.heads[0] for part in found] != edges[:-1] or edges != sorted(set(edges)) or len({p.dim for p in found}) > 1:
            return f"the parts do not cover the heads of layer {layer_idx}, slot {slot} once each"
    if len({rotation.layer_idx for rotation in rotations}) < len(rotations):
        return "a layer is rotated twice"
    for rotation in rotations:
        found = spans.get((rotation.layer_idx, rotation.slot))
        if found is None or 2 * rotation.pairs > found[0].dim:
            return f"layer {rotation.layer_idx}, slot {rotation.slot} has no {rotation.pairs} pairs that could be rotated"
    return None


def tensor_fault(expected: Mapping[str, TensorKind], tensors: Tensors) -> Fault:
    """The first tensor that is missing, unknown, of another dtype or shape than the card says, or not finite."""
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


def _frequencies(layer_idx: int, slot: int) -> str:
    return f"rotation.{layer_idx}.{slot}.frequencies"
