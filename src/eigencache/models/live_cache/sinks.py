"""The first tokens of every row of a compressed cache in 16 bits, wherever the padding of a row ends."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Sinks:
    """First tokens of every row.

    Slots count a row's padding, as attention masks do.

    Attributes:
        keys: Keys in 16 bits [batch, KV heads, count, dim].
        values: Values in 16 bits, same shape but for `dim`.
        slots: Slot of every sink [batch, count].
        seen: Number of slots of the cache that were looked at; sinks in later slots are not stored yet.
    """

    keys: Tensor
    values: Tensor
    slots: Tensor
    seen: int = 0

    def with_tokens(self, window: tuple[Tensor, Tensor], length: int, first: Tensor) -> "Sinks":
        """Return the sinks with those that are in the window now.

        Args:
            window: Keys and values of the window.
            length: Number of slots of the cache, the window included.
            first: Slot of the first token of every row [batch].
        """
        count, begin = self.slots.shape[1], length - window[0].shape[2]
        slots = (first[:, None] + torch.arange(count)).to(self.slots.device)
        new = (slots >= self.seen) & (slots < length)
        indices = (slots - begin).clamp(0, length - begin - 1)[:, None, :, None]
        updated = []
        for stored, x in zip((self.keys, self.values), window, strict=True):
            taken = x.gather(2, indices.expand(-1, x.shape[1], -1, x.shape[3]))
            updated.append(torch.where(new[:, None, :, None], taken, stored))
        return Sinks(updated[0], updated[1], slots, length)

    def first(self, count: int) -> tuple[Tensor, Tensor]:
        """Return keys and values of the first `count` sinks."""
        return self.keys[:, :, :count], self.values[:, :, :count]

    def split(self, mask: Tensor, dropped: int) -> tuple[Tensor, Tensor]:
        """Split a mask into one for the sinks and one for all slots that hides the sinks there.

        Args:
            mask: [batch or 1, heads or 1, seq, slots from `dropped` on], boolean or added to logits.
            dropped: Number of first slots without an entry in the mask.

        Returns:
            Mask of the sinks [batch, heads or 1, seq, count], and mask of the slots.
        """
        total, hidden_value = mask.shape[-1], False if mask.dtype == torch.bool else -torch.inf
        indices = self.slots - dropped
        stored = (indices >= 0) & (self.slots < self.seen)
        mask = mask.expand(len(indices), -1, -1, -1)
        of_sinks = mask.gather(-1, indices.clamp(0, total - 1)[:, None, None].expand(*mask.shape[:3], -1))
        hidden = torch.zeros(len(indices), total + 1, dtype=torch.bool, device=mask.device)
        hidden.scatter_(1, torch.where(stored, indices, total), True)
        return (
            of_sinks.masked_fill(~stored[:, None, None], hidden_value),
            mask.masked_fill(hidden[:, None, None, :total], hidden_value),
        )

    def cropped(self, length: int) -> "Sinks":
        """Return the sinks of a cache that was cropped to `length` slots."""
        return replace(self, seen=min(self.seen, length))

    def select(self, rows: Tensor) -> "Sinks":
        """Return the sinks of the rows with the given indices; an index may repeat."""
        return Sinks(self.keys[rows], self.values[rows], self.slots[rows], self.seen)


def no_sinks(window: tuple[Tensor, Tensor], count: int) -> Sinks:
    """Return empty sinks for `count` tokens of every row, in the dtype of the window."""
    keys, values = (x.new_zeros(x.shape[0], x.shape[1], count, x.shape[3]) for x in window)
    return Sinks(keys, values, torch.zeros(len(keys), count, dtype=torch.int64, device=keys.device))
