"""The mean of keys before rotation, taken out of keys that are stored after it, and put back into logits (THEORY 8).

A large bias of a key projection is a constant before rotation and a circle after it, which no static step can code. Its
logit q · R_n μ is a sum of cos(nθ) and sin(nθ) of the pairs concerned: angles of a block's first token on one side, a table
of 64 tokens on the other, so that nothing is held per token.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional as F

from eigencache.kernels.packed.format import BLOCK
from eigencache.kernels.packed.reference import RotatedMean, RotatedMeanLogits
from eigencache.modes import constant
from eigencache.spectral.rope import Angles, Rotation, joined, pairs, rotate


@dataclass(frozen=True, eq=False)
class KeyMean:
    """`mean` [heads, dim] before rotation, zero outside the pairs that are taken out, of keys rotated by `rotation`."""

    mean: Tensor
    rotation: Rotation

    def tensors(self) -> Iterable[Tensor]:
        """All that is held."""
        return (self.mean, self.rotation.frequencies)

    def to(self, device: str | torch.device) -> "KeyMean":
        """The same where the cache is."""
        rotation = replace(self.rotation, frequencies=self.rotation.frequencies.to(device))
        return KeyMean(self.mean.to(device), rotation)

    def at(self, positions: Tensor) -> Tensor:
        """R_n μ [batch, heads, tokens, dim] float32 at positions [batch, tokens]."""
        turned = positions.to(self.mean.device, torch.float64)[:, None, :, None] * self.rotation.frequencies
        angles = Angles(*((self.rotation.scale * part).float() for part in (turned.cos(), turned.sin())))
        means = self.mean[None, :, None].expand(len(positions), -1, positions.shape[1], -1)
        return rotate(means, angles, self.rotation.pairing)

    def mean_at(self, starts: Tensor) -> RotatedMean:
        """R_n μ of blocks that begin at positions `starts` [batch, blocks], in factors."""
        rotation, dim = self.rotation, self.mean.shape[1]
        theta, interleaved = rotation.frequencies, rotation.pairing == "interleaved"
        every = F.pad(joined(theta, theta, interleaved), (0, dim - 2 * len(theta)))  # what does not turn has no mean
        scale, none = torch.full_like(theta, rotation.scale).float(), torch.zeros_like(theta).float()
        still, quarter = (
            rotate(self.mean[None, :, None], Angles(*(x[None, None, None] for x in parts)), rotation.pairing)[0, :, 0]
            for parts in ((scale, none), (none, scale))
        )
        first = starts.to(every)[..., None] * every
        within = every[:, None] * torch.arange(BLOCK, device=every.device, dtype=every.dtype)
        angles = (torch.stack([x.cos(), x.sin()]).float() for x in (first, within))
        return RotatedMean(still, quarter, *angles)

    def turned(self, queries: Tensor, starts: Tensor) -> RotatedMeanLogits:
        """q · R_n μ of queries [batch, heads, rows, dim], in factors; blocks begin at positions `starts` [batch, blocks]."""
        frequencies, m1, m2, table, used = self._prepared
        turns = 2 * len(self.rotation.frequencies)
        q1, q2 = (part[..., used] for part in pairs(queries.float()[..., :turns], self.rotation.pairing == "interleaved"))
        first = starts.to(frequencies)[..., None] * frequencies
        return RotatedMeanLogits(q1 * m1 + q2 * m2, q2 * m1 - q1 * m2, first.cos().float(), first.sin().float(), table)

    def logits(self, queries: Tensor, starts: Tensor) -> Tensor:
        """The same as numbers [batch, heads, rows, 64 · blocks]."""
        return self.turned(queries, starts).logits()

    @cached_property
    @constant
    def _prepared(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Of the pairs that have a mean: frequencies, both means [heads, 1, pairs], cos and sin in a block, and which."""
        turns = 2 * len(self.rotation.frequencies)
        first, second = pairs(self.mean[:, :turns] * self.rotation.scale, self.rotation.pairing != "half")
        used = (first.abs() + second.abs()).amax(0).nonzero().flatten()
        frequencies = self.rotation.frequencies[used]
        within = torch.arange(BLOCK, device=frequencies.device, dtype=frequencies.dtype) * frequencies[:, None]
        table = torch.cat([within.cos(), within.sin()]).float()
        return frequencies, first[:, None, used], second[:, None, used], table, used
