"""The mean of keys before rotation, taken out of keys that are stored after it, and put back into logits (THEORY 8).

A large bias of a key projection is a constant before rotation and a circle after it, which no static step can code. Its
logit q · R_n μ is a sum of cos(nθ) and sin(nθ) of the pairs concerned: angles of a block's first token on one side, a table
of 64 tokens on the other, so that nothing is held per token.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from eigencache.kernels.reference import BLOCK
from eigencache.spectral.rope import Angles, Rotation, rotate


@dataclass(frozen=True, eq=False)
class Turning:
    """`mean` [heads, dim] before rotation, zero outside the pairs that are taken out, of keys rotated by `rotation`."""

    mean: Tensor
    rotation: Rotation

    def tensors(self) -> Iterable[Tensor]:
        """All that is held."""
        return (self.mean, self.rotation.frequencies)

    def to(self, device: str | torch.device) -> "Turning":
        """The same where the cache is."""
        rotation = replace(self.rotation, frequencies=self.rotation.frequencies.to(device))
        return Turning(self.mean.to(device), rotation)

    def at(self, positions: Tensor) -> Tensor:
        """R_n μ [batch, heads, tokens, dim] float32 at positions [batch, tokens]."""
        turned = positions.to(self.mean.device, torch.float64)[:, None, :, None] * self.rotation.frequencies
        angles = Angles(*((self.rotation.scale * part).float() for part in (turned.cos(), turned.sin())))
        means = self.mean[None, :, None].expand(len(positions), -1, positions.shape[1], -1)
        return rotate(means, angles, self.rotation.pairing)

    def logits(self, queries: Tensor, starts: Tensor) -> Tensor:
        """q · R_n μ [batch, heads, rows, 64 · blocks] of queries [batch, heads, rows, dim].

        Blocks begin at positions `starts` [batch, blocks].
        """
        used = self._used
        turns = 2 * len(self.rotation.frequencies)
        interleaved = self.rotation.pairing == "interleaved"
        split = lambda x, neighbours: (x[..., ::2], x[..., 1::2]) if neighbours else x.chunk(2, -1)  # noqa: E731
        q1, q2 = (part[..., used] for part in split(queries.float()[..., :turns], interleaved))
        m1, m2 = (
            part[:, None, used] * self.rotation.scale
            for part in split(self.mean[:, :turns], self.rotation.pairing != "half")
        )
        even, odd = q1 * m1 + q2 * m2, q2 * m1 - q1 * m2  # factors of cos(nθ) and sin(nθ)
        frequencies = self.rotation.frequencies[used]
        first = starts.to(frequencies)[:, None, None, :, None] * frequencies
        cos, sin = first.cos().float(), first.sin().float()
        even, odd = even[..., None, :], odd[..., None, :]
        sides = torch.cat([even * cos + odd * sin, odd * cos - even * sin], -1)
        within = torch.arange(BLOCK, device=frequencies.device, dtype=frequencies.dtype) * frequencies[:, None]
        return (sides @ torch.cat([within.cos(), within.sin()]).float()).flatten(-2)

    @property
    def _used(self) -> Tensor:
        """Pairs in which some head has a mean."""
        turns = 2 * len(self.rotation.frequencies)
        head = self.mean[:, :turns]
        pairs = (head[..., ::2], head[..., 1::2]) if self.rotation.pairing != "half" else head.chunk(2, -1)
        return (pairs[0].abs() + pairs[1].abs()).amax(0).nonzero().flatten()
