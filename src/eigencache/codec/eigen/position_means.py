"""What a position adds to what a model without rotation caches: learned positions leave their mark on every vector.

In `ref-gpt2` it is nearly all of the variance. It lies in a few directions, and is held once, with the codec.
"""

from dataclasses import dataclass

from torch import Tensor

from eigencache.codec.row_major import RowMajor


@dataclass(frozen=True, eq=False)
class PositionMeans(RowMajor):
    """Position p adds row p of `places` [positions, k] float16, times `rows` [k, width] float16; later ones as the last."""

    places: Tensor
    rows: Tensor

    def at(self, positions: Tensor) -> Tensor:
        """What is added at `positions` [n]: [n, width] float32."""
        known = positions.to(self.places.device).clamp_max(len(self.places) - 1)
        return self.places[known].float() @ self.rows.float()
