"""What a position adds to what a model without rotation caches: learned positions leave their mark on every vector.

In `ref-gpt2` it is nearly all of the variance. It lies in a few directions, and is held once, with the codec.
"""

from collections.abc import Iterable
from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class PositionMeans:
    """Position p adds row p of `places` [positions, k] float16, times `rows` [k, width] float16; later ones as the last."""

    places: Tensor
    rows: Tensor

    def __post_init__(self) -> None:
        """Row by row, as it is saved: in another order the same numbers multiply to other last bits."""
        for field in fields(self):
            object.__setattr__(self, field.name, getattr(self, field.name).contiguous())

    def tensors(self) -> Iterable[Tensor]:
        """All that is held."""
        return (self.places, self.rows)

    def to(self, device: str | torch.device) -> "PositionMeans":
        """The same where the cache is."""
        return PositionMeans(*(t.to(device) for t in self.tensors()))

    def at(self, positions: Tensor) -> Tensor:
        """What is added at `positions` [n]: [n, width] float32."""
        known = positions.to(self.places.device).clamp_max(len(self.places) - 1)
        return self.places[known].float() @ self.rows.float()
