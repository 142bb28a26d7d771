"""What codecs have in common that treat every slot of every layer by itself: names, refusals and the way back.

Slots of a layer may differ in heads and width, as latent and rotary key of MLA do.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from eigencache.codec.base import Cached, Encoded, length_of, owned, to_sixteen_bit
from eigencache.codec.baselines.asymmetric import refuse_non_finite

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True, eq=False)
class EncodedSlots(Encoded):
    """Tensors named `layer.slot.part`, and the width of every slot's vectors, which is the model's and costs nothing."""

    widths: Mapping[tuple[int, int], int]

    def select(self, rows: Tensor) -> "EncodedSlots":
        """The given rows of the batch."""
        return replace(self, tensors=super().select(rows).tensors)


class PerSlot(ABC):
    """A codec of which subclasses say how one slot [batch, heads, seq, width] becomes tensors and comes back."""

    dtype: torch.dtype  # the model's

    @property
    @abstractmethod
    def name(self) -> str:
        """What tables call it."""

    def encode(self, cached: Cached, start: int) -> EncodedSlots:
        """Both slots of every layer. Raises `CodecError` for NaN, infinite values, and what float16 cannot hold."""
        tensors, widths = {}, {}
        for layer_idx, both in cached.items():
            for slot, x in enumerate(both):
                what = f"{self.name}: layer {layer_idx}"
                refuse_non_finite(x, what)
                raw = self.is_raw(layer_idx, slot)
                parts = {"raw": to_sixteen_bit(x, what)} if raw else self.slot_encoded(x, layer_idx, slot, what)
                tensors |= {f"{layer_idx}.{slot}.{part}": owned(tensor) for part, tensor in parts.items()}
                widths[layer_idx, slot] = x.shape[-1]
        return EncodedSlots(tensors, start, length_of(cached), widths)

    def decode(self, encoded: EncodedSlots) -> dict[int, tuple[Tensor, Tensor]]:
        """Both slots of every layer in the model's dtype."""
        parts: dict[tuple[int, int], dict[str, Tensor]] = {at: {} for at in encoded.widths}
        for name, tensor in encoded.tensors.items():
            layer_idx, slot, part = name.split(".")
            parts[int(layer_idx), int(slot)][part] = tensor
        slots = {
            at: found["raw"] if "raw" in found else self.slot_decoded(found, *at, encoded.widths[at])
            for at, found in parts.items()
        }
        layers = dict.fromkeys(layer_idx for layer_idx, _ in encoded.widths)
        return {i: (slots[i, 0].to(self.dtype), slots[i, 1].to(self.dtype)) for i in layers}

    def is_raw(self, layer_idx: int, slot: int) -> bool:
        """Whether a slot is kept in 16 bits as it is; none is, unless a subclass says so."""
        return False

    @abstractmethod
    def slot_encoded(self, x: Tensor, layer_idx: int, slot: int, what: str) -> Tensors:
        """The tensors that a slot becomes, batch first. `what` begins the message of an error."""

    @abstractmethod
    def slot_decoded(self, parts: Tensors, layer_idx: int, slot: int, width: int) -> Tensor:
        """The slot again [batch, heads, seq, width]."""
