"""The mean vector of every position, for models with learned positions instead of rotation.

In `ref-gpt2` these means are nearly all of the variance. They lie in a few directions, and are stored once, with the codec.
"""

from dataclasses import dataclass

from torch import Tensor

from eigencache.codec.row_major import RowMajor


@dataclass(frozen=True, eq=False)
class PositionMeans(RowMajor):
    """Position p has the mean `places`[p] @ `rows`, float16 [positions, k] and [k, width]; later ones have the last mean."""

    places: Tensor
    rows: Tensor

    def at(self, positions: Tensor) -> Tensor:
        """Return the means [n, width] in float32 at `positions` [n]."""
        known = positions.to(self.places.device).clamp_max(len(self.places) - 1)
        return self.places[known].float() @ self.rows.float()
