"""A live codec as a card's entries and named tensors, and back."""

from typing import Any

import torch
from torch import Tensor

from eigencache.codec.live.codec import LiveCodec
from eigencache.codec.live.packed_heads import PackedHeads
from eigencache.codec.live.rotated_mean import KeyMean
from eigencache.codec.saved.card import CardBundle, CardHeads, LiveCard
from eigencache.codec.saved.kind import (
    Fault,
    Kind,
    TensorKind,
    Tensors,
    card_rotations,
    frequencies_of,
    frequency_kinds,
    nothing,
    rotations_from,
)
from eigencache.kernels.packed.format import GROUP, Widths

_PARTS = ("encoder", "decoder", "mean")


def _entries_of(codec: LiveCodec) -> dict[str, Any]:
    return {
        "sinks": codec.sinks,
        "window": codec.window,
        "reach": codec.reach,
        "rotations": card_rotations(_rotations_of(codec)),
        "slots": [
            CardHeads(
                layer_idx=layer_idx,
                slot=slot,  # type: ignore[arg-type]
                heads=heads.mean.shape[0],
                dim=heads.mean.shape[1],
                bundles=[
                    CardBundle(**vars(widths), six=count)
                    for widths, count in zip(heads.widths, heads.six or (0,) * len(heads.widths), strict=True)
                ],
            )
            for layer_idx, both in codec.layers.items()
            for slot, heads in enumerate(both)
        ],
    }


def _tensors_of(codec: LiveCodec) -> dict[str, Tensor]:
    tensors = {}
    for layer_idx, both in codec.layers.items():
        for slot, heads in enumerate(both):
            tensors |= {f"{layer_idx}.{slot}.{part}": getattr(heads, part) for part in _PARTS}
            if heads.rotated_mean is not None:
                tensors[f"{layer_idx}.{slot}.turning"] = heads.rotated_mean.mean
    return tensors | frequencies_of(_rotations_of(codec))


def _rotations_of(codec: LiveCodec) -> dict[int, Any]:
    return {
        i: (s, h.rotated_mean.rotation) for i, both in codec.layers.items() for s, h in enumerate(both) if h.rotated_mean
    }


def _card_fault(card: LiveCard) -> Fault:
    found = [(one.layer_idx, one.slot) for one in card.slots]
    if found != [(layer_idx, slot) for layer_idx in dict.fromkeys(i for i, _ in found) for slot in (0, 1)]:
        return "the slots are not both of every layer, one after the other"
    for one in card.slots:
        where = f"layer {one.layer_idx}, slot {one.slot}"
        if one.heads % len(one.bundles):
            return f"{where}: {one.heads} heads cannot be {len(one.bundles)} bundles"
        numbers = one.heads // len(one.bundles) * one.dim
        if any(b.six > min(b.four, b.two) for b in one.bundles):
            return f"{where}: more coefficients have 6 bits than there are digits of 4 and of 2"
        if max(b.eight + b.four + b.two - b.six for b in one.bundles) > -(-numbers // GROUP) * GROUP:
            return f"{where}: a bundle has more coefficients than its heads numbers"
    slots = {(one.layer_idx, one.slot): one for one in card.slots}
    for rotation in card.rotations:
        one = slots.get((rotation.layer_idx, rotation.slot))
        if one is None or 2 * rotation.pairs > one.dim:
            return f"layer {rotation.layer_idx}, slot {rotation.slot} has no {rotation.pairs} pairs that could be rotated"
    if len({rotation.layer_idx for rotation in card.rotations}) < len(card.rotations):
        return "a layer is rotated twice"
    if card.window != card.settings.window or card.settings.sinks not in (None, card.sinks):
        return "sinks or window are not what the settings say"
    interval = card.expected.delta_nll_interval
    return "the expected interval ends before it begins" if interval and interval[0] > interval[1] else None


def _tensor_kinds(card: LiveCard) -> dict[str, TensorKind]:
    kinds: dict[str, TensorKind] = {}
    turned = {(rotation.layer_idx, rotation.slot) for rotation in card.rotations}
    for one in card.slots:
        name = f"{one.layer_idx}.{one.slot}"
        most = max(b.eight + b.four + b.two for b in one.bundles)
        shape = len(one.bundles), most, one.heads // len(one.bundles) * one.dim
        kinds |= {f"{name}.encoder": (torch.float32, shape), f"{name}.decoder": (torch.float32, shape)}
        kinds[f"{name}.mean"] = torch.float32, (one.heads, one.dim)
        if (one.layer_idx, one.slot) in turned:
            kinds[f"{name}.turning"] = torch.float32, (one.heads, one.dim)
    return kinds | frequency_kinds(card.rotations)


def _codec_from(card: LiveCard, tensors: Tensors) -> LiveCodec:
    rotations = rotations_from(card.rotations, tensors)
    layers: dict[int, list[PackedHeads]] = {}
    for one in card.slots:
        name = f"{one.layer_idx}.{one.slot}"
        turned = f"{name}.turning" in tensors
        heads = PackedHeads(
            tuple(Widths(b.eight, b.four, b.two) for b in one.bundles),
            *(tensors[f"{name}.{part}"] for part in _PARTS),  # type: ignore[call-arg]
            rotated_mean=KeyMean(tensors[f"{name}.turning"], rotations[one.layer_idx][1]) if turned else None,
            six=tuple(b.six for b in one.bundles),
        )
        layers.setdefault(one.layer_idx, []).append(heads)
    pairs = {i: (keys, values) for i, (keys, values) in layers.items()}
    return LiveCodec(card.name, pairs, card.sinks, card.window, getattr(torch, card.origin.dtype), card.reach)


KIND = Kind(LiveCodec, LiveCard, _entries_of, _tensors_of, _card_fault, _tensor_kinds, nothing, _codec_from, nothing)
