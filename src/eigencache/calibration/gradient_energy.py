"""Gradient energy by position: E|g|² of the gradients of cached vectors, and the number of first tokens that it singles out.

An attention sink has small keys and values, so their size does not reveal it. What a codec loses by coding a token is, to
second order, its gradient energy times the squared error, and there a sink stands out.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from eigencache.codec.sinks_and_window import FIRST_EXACT

POSITIONS = 16  # first positions, each with an energy of its own
# A position is a sink if its gradient energy is this many times that of a token after the first 16. At a context of 2,048
# tokens, such a token causes 3 % of the loss if it is coded like the others; storing it exactly takes 0.8 % of the bytes at
# one bit per value. On WikiText-2 the first token has 2,822 (SmolLM2), 68 (Gemma 3) and 1,772 times (Qwen2.5-Coder), and no
# position after the fourth more than 7.2 times (`LOG.md`, 2026-11-27).
FAR_ABOVE = 64.0
Place = tuple[int, int]  # layer, slot


@dataclass(eq=False)
class GradientEnergy:
    """Σ|g|² over the heads of every layer and slot, by sequence and position.

    Attributes:
        first: Energy of the first positions [sequences of a batch, 16] by layer and slot, one tensor per batch; NaN beyond
            the end of a sequence.
        later: Sum over all tokens after the first positions, by layer and slot.
        tokens: Number of those tokens.
    """

    first: dict[Place, list[Tensor]] = field(default_factory=dict)
    later: dict[Place, float] = field(default_factory=dict)
    tokens: int = 0

    def add(self, gradients: Mapping[int, tuple[Tensor, Tensor]], lengths: Sequence[int]) -> None:
        """Add the gradients of one batch.

        Args:
            gradients: Gradients of both slots by layer, each [batch, heads, seq, dim], zero for padding.
            lengths: Tokens of each sequence, without padding.
        """
        beyond = torch.arange(POSITIONS) >= torch.tensor(lengths)[:, None]
        for layer_idx, slots in gradients.items():
            for slot, gradient in enumerate(slots):
                energy = gradient.double().square().sum((1, 3)).cpu()
                place, first = (layer_idx, slot), energy[:, :POSITIONS]
                first = torch.nn.functional.pad(first, (0, POSITIONS - first.shape[1])).masked_fill(beyond, torch.nan)
                self.first.setdefault(place, []).append(first)
                self.later[place] = self.later.get(place, 0.0) + float(energy[:, POSITIONS:].sum())
        self.tokens += sum(max(0, length - POSITIONS) for length in lengths)

    def by_position(self, place: Place) -> list[float]:
        """Return E|g|² at the first 16 positions, or at as many as the longest sequence has."""
        return [float(x) for x in torch.cat(self.first[place]).nanmean(0) if x.isfinite()]

    def rest(self, place: Place) -> float | None:
        """Return E|g|² of the tokens after the first 16; None without such tokens."""
        return self.later[place] / self.tokens if self.tokens else None

    def share(self, place: Place, first: int = FIRST_EXACT) -> float:
        """Return the share of Σ|g|² that the `first` tokens of all sequences have; 0 if no vector has a gradient."""
        energies = torch.cat(self.first[place])
        total = float(energies.nansum()) + self.later[place]
        return float(energies[:, :first].nansum()) / total if total else 0.0

    def relative(self) -> Tensor:
        """Return the energy of the first positions relative to that of the later tokens [16].

        It is the mean over layers and slots, and the median over sequences: what stands at one position of one text is not a
        property of the position. NaN where nothing is known.
        """
        ratios = [torch.cat(self.first[place]) / rest for place in self.first if (rest := self.rest(place))]
        if not ratios:
            return torch.full((POSITIONS,), torch.nan, dtype=torch.float64)
        return torch.stack(ratios).mean(0).nanmedian(0).values

    @property
    def sinks(self) -> int:
        """Number of first tokens to store exactly: 4, and those after them that stand out, without a gap."""
        relative = self.relative()
        count = FIRST_EXACT
        while count < POSITIONS and relative[count] > FAR_ABOVE:
            count += 1
        return count
