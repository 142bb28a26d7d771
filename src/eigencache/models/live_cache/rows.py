"""Where the rows of a compressed cache begin: after padding, and at any position."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from eigencache.errors import CodecError


@dataclass(frozen=True, eq=False)
class Rows:
    """Beginning of every row of the batch.

    Attributes:
        first: Slot of the first token that is no padding [batch] int64.
        origin: Position of slot 0 [batch] int64; below 0 if padding precedes the token at position 0.
    """

    first: Tensor
    origin: Tensor

    @cached_property
    def last(self) -> int:
        """Largest of the first slots; above 0 if a row has padding."""
        return max(self.first.tolist(), default=0)

    def begin_after(self, past: int) -> bool:
        """Return whether a row has only padding in its first `past` slots."""
        return self.last >= past

    def begun(self, seen: Tensor, positions: Tensor | None, past: int) -> "Rows":
        """Return the rows after new tokens, where rows that had only padding may have begun.

        Args:
            seen: Whether each new token is no padding [batch, new].
            positions: Positions of the new tokens [batch, new]; None if the first token of a row has position 0.
            past: Number of slots before the new tokens.
        """
        new = seen.shape[1]
        leading = torch.where(seen.any(1), seen.int().argmax(1), new)
        first = past + leading
        origin = -first if positions is None else positions.gather(1, leading.clamp_max(new - 1)[:, None])[:, 0] - first
        empty = self.first >= past
        return Rows(torch.where(empty, first, self.first), torch.where(empty, origin, self.origin))

    def require_neighbors(self, seen: Tensor, positions: Tensor, past: int) -> None:
        """Check that the positions of new tokens are consecutive in every row.

        Args:
            seen: Whether each new token is no padding [batch, new].
            positions: Positions of the new tokens [batch, new].
            past: Number of slots before the new tokens.

        Raises:
            CodecError: The position of a token differs from that of its slot.
        """
        expected = past + torch.arange(seen.shape[1]) + self.origin[:, None]
        wrong = (seen & (positions != expected)).nonzero()
        if len(wrong):
            row, token = wrong[0].tolist()
            raise CodecError(
                f"sequence {row}: the compressed cache expects position {int(expected[row, token])} next, not "
                f"{int(positions[row, token])}: pass consecutive position_ids, pad on the left, or make a new cache"
            )

    def select(self, rows: Tensor) -> "Rows":
        """Return the rows with the given indices; an index may repeat."""
        return Rows(self.first[rows.cpu()], self.origin[rows.cpu()])


def unpadded(batch: int) -> Rows:
    """Return rows that begin at slot 0 and position 0."""
    zeros = torch.zeros(batch, dtype=torch.int64)
    return Rows(zeros, zeros)
