"""The first tokens of every row of a live cache in 16 bits, wherever a row's padding ends."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Sinks:
    """`keys` and `values` [batch, KV heads, count, dim] of the tokens in `slots` [batch, count].

    Of slots from `seen` on nothing is held yet. Slots count a row's padding, as a mask does.
    """

    keys: Tensor
    values: Tensor
    slots: Tensor
    seen: int = 0

    def with_tokens(self, window: tuple[Tensor, Tensor], length: int, first: Tensor) -> "Sinks":
        """With what the window of a cache of `length` slots holds of them; a row's `first` [batch] is the first of them."""
        count, begin = self.slots.shape[1], length - window[0].shape[2]
        slots = (first[:, None] + torch.arange(count)).to(self.slots.device)
        new = (slots >= self.seen) & (slots < length)
        at = (slots - begin).clamp(0, length - begin - 1)[:, None, :, None]
        found = []
        for held, x in zip((self.keys, self.values), window, strict=True):
            taken = x.gather(2, at.expand(-1, x.shape[1], -1, x.shape[3]))
            found.append(torch.where(new[:, None, :, None], taken, held))
        return Sinks(found[0], found[1], slots, length)

    def first(self, count: int) -> tuple[Tensor, Tensor]:
        """Keys and values of the first `count`."""
        return self.keys[:, :, :count], self.values[:, :, :count]

    def split(self, mask: Tensor, dropped: int) -> tuple[Tensor, Tensor]:
        """A mask [batch or 1, heads or 1, seq, slots from `dropped` on] for the sinks, and one that hides them elsewhere."""
        total, hides = mask.shape[-1], False if mask.dtype == torch.bool else -torch.inf
        at = self.slots - dropped
        held = (at >= 0) & (self.slots < self.seen)
        mask = mask.expand(len(at), -1, -1, -1)
        own = mask.gather(-1, at.clamp(0, total - 1)[:, None, None].expand(*mask.shape[:3], -1))
        hidden = torch.zeros(len(at), total + 1, dtype=torch.bool, device=mask.device)
        hidden.scatter_(1, torch.where(held, at, total), True)
        return own.masked_fill(~held[:, None, None], hides), mask.masked_fill(hidden[:, None, None, :total], hides)

    def cropped(self, length: int) -> "Sinks":
        """What of it a cache of `length` slots still knows."""
        return replace(self, seen=min(self.seen, length))

    def select(self, rows: Tensor) -> "Sinks":
        """The given rows, each as often as it is named."""
        return Sinks(self.keys[rows], self.values[rows], self.slots[rows], self.seen)


def no_sinks(window: tuple[Tensor, Tensor], count: int) -> Sinks:
    """Room for `count` tokens of every row of a window."""
    keys, values = (x.new_zeros(x.shape[0], x.shape[1], count, x.shape[3]) for x in window)
    return Sinks(keys, values, torch.zeros(len(keys), count, dtype=torch.int64, device=keys.device))
