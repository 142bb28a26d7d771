"""The mean of keys before rotation, subtracted from keys that are stored after rotation, and added back to logits.

A large bias of a key projection is constant before rotation. After rotation it moves along a circle, which no static step
can code (THEORY 8). `KeyMean` subtracts this rotated mean from keys before they are packed. Its share of a logit, q · R_n μ,
is a sum of cos(nθ) and sin(nθ) over the pairs that have a mean. Both follow from the angles of a block's first token and a
table for the 64 tokens of a block, so nothing is stored per token.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional as F

from eigencache.codec.mean_before_rotation import rotated_mean
from eigencache.kernels.packed.format import BLOCK
from eigencache.kernels.packed.reference import RotatedMean, RotatedMeanLogits
from eigencache.modes import constant
from eigencache.spectral.rope import Angles, Rotation, joined, pairs, rotate


@dataclass(frozen=True, eq=False)
class KeyMean:
    """Mean μ of one layer's keys before rotation, and the rotation of the layer.

    Attributes:
        mean: μ [heads, dim] float32; zero in the pairs whose mean is not subtracted.
        rotation: Rotation that the model applies to the keys.
    """

    mean: Tensor
    rotation: Rotation

    def tensors(self) -> Iterable[Tensor]:
        """Return all stored tensors."""
        return (self.mean, self.rotation.frequencies)

    def to(self, device: str | torch.device) -> "KeyMean":
        """Return a copy on `device`."""
        rotation = replace(self.rotation, frequencies=self.rotation.frequencies.to(device))
        return KeyMean(self.mean.to(device), rotation)

    def rotated_to(self, positions: Tensor) -> Tensor:
        """Return R_n μ [batch, heads, tokens, dim] float32 at `positions` [batch, tokens]."""
        return rotated_mean(self.mean, self.rotation, positions)

    def rotated_to_blocks(self, starts: Tensor) -> RotatedMean:
        """Return R_n μ of whole blocks in the factors that kernels read.

        Args:
            starts: Position of the first token of every block [batch, blocks].
        """
        rotation, dim = self.rotation, self.mean.shape[1]
        theta, interleaved = rotation.frequencies, rotation.pairing == "interleaved"
        every = F.pad(joined(theta, theta, interleaved), (0, dim - 2 * len(theta)))  # numbers without rotation have no mean
        scale, none = torch.full_like(theta, rotation.scale).float(), torch.zeros_like(theta).float()
        still, quarter = (
            rotate(self.mean[None, :, None], Angles(*(x[None, None, None] for x in parts)), rotation.pairing)[0, :, 0]
            for parts in ((scale, none), (none, scale))
        )
        first = starts.to(every)[..., None] * every
        within = every[:, None] * torch.arange(BLOCK, device=every.device, dtype=every.dtype)
        angles = (torch.stack([x.cos(), x.sin()]).float() for x in (first, within))
        return RotatedMean(still, quarter, *angles)

    def logit_factors(self, queries: Tensor, starts: Tensor) -> RotatedMeanLogits:
        """Return q · R_n μ for whole blocks in the factors that kernels read.

        Args:
            queries: Queries after rotation [batch, heads, rows, dim].
            starts: Position of the first token of every block [batch, blocks].
        """
        frequencies, m1, m2, table, used = self._prepared
        rotary_dim = 2 * len(self.rotation.frequencies)
        interleaved = self.rotation.pairing == "interleaved"
        q1, q2 = (part[..., used] for part in pairs(queries.float()[..., :rotary_dim], interleaved))
        first = starts.to(frequencies)[..., None] * frequencies
        return RotatedMeanLogits(q1 * m1 + q2 * m2, q2 * m1 - q1 * m2, first.cos().float(), first.sin().float(), table)

    def logits(self, queries: Tensor, starts: Tensor) -> Tensor:
        """Return q · R_n μ as numbers [batch, heads, rows, 64 · blocks]; arguments as for `logit_factors`."""
        return self.logit_factors(queries, starts).logits()

    @cached_property
    @constant
    def _prepared(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Return, for the pairs that have a mean: θ, both parts of μ [heads, 1, pairs], the block's table, pair indices."""
        rotary_dim = 2 * len(self.rotation.frequencies)
        first, second = pairs(self.mean[:, :rotary_dim] * self.rotation.scale, self.rotation.pairing != "half")
        used = (first.abs() + second.abs()).amax(0).nonzero().flatten()
        frequencies = self.rotation.frequencies[used]
        within = torch.arange(BLOCK, device=frequencies.device, dtype=frequencies.dtype) * frequencies[:, None]
        table = torch.cat([within.cos(), within.sin()]).float()
        return frequencies, first[:, None, used], second[:, None, used], table, used
