"""Saving a `LiveCodec`: transforms, means and bit widths of every slot."""

from typing import Annotated, Any, Literal

import torch
from pydantic import Field, NonNegativeInt, PositiveInt
from torch import Tensor

from eigencache.codec.live.codec import LiveCodec
from eigencache.codec.live.packed_heads import PackedHeads
from eigencache.codec.live.rotated_mean import KeyMean
from eigencache.codec.saved.card import CodecCard, Count32, NonNegative
from eigencache.codec.saved.layouts import card_rotations, frequencies_of, frequency_kinds, rotations_from
from eigencache.codec.saved.registry import Fault, SavedKind, TensorKind, Tensors, saved_codec
from eigencache.kernels.packed.format import GROUP, Widths
from eigencache.records.base import Record
from eigencache.records.fit import Expected

_PARTS = ("encoder", "decoder", "mean")
_Eights = Annotated[int, Field(ge=0, le=2**20, multiple_of=8)]


class LiveCardSettings(Record):
    """Settings of the fit. `sinks` None: detected first positions; `reach` None: that of the model."""

    alpha: NonNegative  # power of the metric
    shared: PositiveInt  # largest total width of heads that share a basis
    sinks: Count32 | None
    window: Count32
    reach: PositiveInt | None = None


class CardBundle(Record):
    """Number of 8-, 4- and 2-bit digits of some heads, and of 6-bit coefficients stored as 4 + 2 bits."""

    eight: _Eights
    four: _Eights
    two: _Eights
    six: Count32 = 0


class CardHeads(Record):
    """One slot of one layer."""

    layer_idx: NonNegativeInt
    slot: Literal[0, 1]
    heads: PositiveInt
    dim: PositiveInt
    bundles: Annotated[list[CardBundle], Field(min_length=1)]


class LiveCard(CodecCard):
    """The card of a `LiveCodec`."""

    kind: Literal["live"] = "live"  # type: ignore[assignment]
    settings: LiveCardSettings
    expected: Expected
    sinks: Count32
    window: Count32
    reach: PositiveInt | None = None  # number of positions it was fitted for; None in cards of earlier versions
    slots: Annotated[list[CardHeads], Field(min_length=1)]


@saved_codec("live")
class SavedLive(SavedKind):
    """Tensors of the packed heads of every slot, and the means that are rotated."""

    codec, card = LiveCodec, LiveCard

    def entries(self, codec: LiveCodec) -> dict[str, Any]:
        """Return sinks, window, rotations and bit widths as fields of the card."""
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

    def tensors(self, codec: LiveCodec) -> dict[str, Tensor]:
        """Return the tensors to save, by name."""
        tensors = {}
        for layer_idx, both in codec.layers.items():
            for slot, heads in enumerate(both):
                tensors |= {f"{layer_idx}.{slot}.{part}": getattr(heads, part) for part in _PARTS}
                if heads.rotated_mean is not None:
                    tensors[f"{layer_idx}.{slot}.turning"] = heads.rotated_mean.mean
        return tensors | frequencies_of(_rotations_of(codec))

    def card_fault(self, card: LiveCard) -> Fault:
        """Return how the card contradicts itself, or None."""
        order = [(heads.layer_idx, heads.slot) for heads in card.slots]
        if order != [(layer_idx, slot) for layer_idx in dict.fromkeys(i for i, _ in order) for slot in (0, 1)]:
            return "the slots are not both of every layer, one after the other"
        for heads in card.slots:
            where = f"layer {heads.layer_idx}, slot {heads.slot}"
            if heads.heads % len(heads.bundles):
                return f"{where}: {heads.heads} heads cannot be {len(heads.bundles)} bundles"
            numbers = heads.heads // len(heads.bundles) * heads.dim
            if any(b.six > min(b.four, b.two) for b in heads.bundles):
                return f"{where}: more coefficients have 6 bits than there are digits of 4 and of 2"
            if max(b.eight + b.four + b.two - b.six for b in heads.bundles) > -(-numbers // GROUP) * GROUP:
                return f"{where}: a bundle has more coefficients than numbers"
        slots = {(heads.layer_idx, heads.slot): heads for heads in card.slots}
        for rotation in card.rotations:
            heads = slots.get((rotation.layer_idx, rotation.slot))
            if heads is None or 2 * rotation.pairs > heads.dim:
                return f"layer {rotation.layer_idx}, slot {rotation.slot} has no {rotation.pairs} pairs to rotate"
        if len({rotation.layer_idx for rotation in card.rotations}) < len(card.rotations):
            return "a layer is rotated twice"
        if card.window != card.settings.window or card.settings.sinks not in (None, card.sinks):
            return "sinks or window are not what the settings say"
        interval = card.expected.delta_nll_interval
        return "the expected interval ends before it begins" if interval and interval[0] > interval[1] else None

    def tensor_kinds(self, card: LiveCard) -> dict[str, TensorKind]:
        """Return dtype and shape of every tensor that the card implies."""
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

    def codec_from(self, card: LiveCard, tensors: Tensors) -> LiveCodec:
        """Return the codec."""
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

    def payload_nbytes(self, codec: LiveCodec, tokens: int, values_per_token: int, coded_bits: float | None) -> int:
        """Return the bytes of one sequence; they do not depend on the text."""
        return codec.nbytes_of(tokens)


def _rotations_of(codec: LiveCodec) -> dict[int, Any]:
    return {
        i: (s, h.rotated_mean.rotation) for i, both in codec.layers.items() for s, h in enumerate(both) if h.rotated_mean
    }
