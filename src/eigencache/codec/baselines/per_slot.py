"""Base class of codecs that encode every slot of every layer by itself.

The two slots of a layer may differ in heads and width, as latent and rotary key of MLA do.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from eigencache.codec.base import Cached, Encoded, length_of, owned, to_sixteen_bit
from eigencache.codec.quantization.grouped import require_finite

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True, eq=False)
class EncodedSlots(Encoded):
    """Tensors named `layer.slot.part`, and the vector width of every slot, which is the model's and costs nothing."""

    widths: Mapping[tuple[int, int], int]

    def select(self, rows: Tensor) -> "EncodedSlots":
        """Return the given rows of the batch."""
        return replace(self, tensors=super().select(rows).tensors)


class PerSlot(ABC):
    """A codec whose subclasses encode and decode one slot [batch, heads, seq, width] at a time."""

    dtype: torch.dtype  # the model's

    @property
    @abstractmethod
    def name(self) -> str:
        """Name in tables."""

    def encode(self, cached: Cached, start: int) -> EncodedSlots:
        """Encode both slots of every layer.

        Raises:
            CodecError: The cache holds NaN, infinite values, or values that float16 cannot represent.
        """
        tensors, widths = {}, {}
        for layer_idx, both in cached.items():
            for slot, x in enumerate(both):
                what = f"{self.name}: layer {layer_idx}"
                require_finite(x, what)
                raw = self.is_raw(layer_idx, slot)
                parts = {"raw": to_sixteen_bit(x, what)} if raw else self.slot_encoded(x, layer_idx, slot, what)
                tensors |= {f"{layer_idx}.{slot}.{part}": owned(tensor) for part, tensor in parts.items()}
                widths[layer_idx, slot] = x.shape[-1]
        return EncodedSlots(tensors, start, length_of(cached), widths)

    def decode(self, encoded: EncodedSlots) -> dict[int, tuple[Tensor, Tensor]]:
        """Return both slots of every layer in the model's dtype."""
        by_slot: dict[tuple[int, int], dict[str, Tensor]] = {key: {} for key in encoded.widths}
        for name, tensor in encoded.tensors.items():
            layer_idx, slot, part = name.split(".")
            by_slot[int(layer_idx), int(slot)][part] = tensor
        slots = {
            key: parts["raw"] if "raw" in parts else self.slot_decoded(parts, *key, encoded.widths[key])
            for key, parts in by_slot.items()
        }
        layers = dict.fromkeys(layer_idx for layer_idx, _ in encoded.widths)
        return {i: (slots[i, 0].to(self.dtype), slots[i, 1].to(self.dtype)) for i in layers}

    def is_raw(self, layer_idx: int, slot: int) -> bool:
        """Return whether a slot stays in 16 bits; False unless a subclass overrides it."""
        return False

    @abstractmethod
    def slot_encoded(self, x: Tensor, layer_idx: int, slot: int, what: str) -> Tensors:
        """Encode one slot.

        Args:
            x: The slot [batch, heads, seq, width].
            layer_idx: Its layer.
            slot: 0 or 1.
            what: Begins the message of an error.

        Returns:
            Named tensors whose first dimension is the batch.
        """

    @abstractmethod
    def slot_decoded(self, parts: Tensors, layer_idx: int, slot: int, width: int) -> Tensor:
        """Decode one slot.

        Args:
            parts: The tensors that `slot_encoded` returned.
            layer_idx: The layer of the slot.
            slot: 0 or 1.
            width: Numbers of one head.

        Returns:
            The slot [batch, heads, seq, width].
        """
