"""Where the rows of a live cache begin: with padding, and at any position."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from eigencache.errors import CodecError


@dataclass(frozen=True, eq=False)
class Rows:
    """Of every row the slot of its `first` token that is no padding, and the position of slot 0, its `origin` [batch] int64.

    An origin is below 0 where padding stands before the token at position 0.
    """

    first: Tensor
    origin: Tensor

    @cached_property
    def last(self) -> int:
        """The slot in which the last of them begins: above 0 where a row has padding."""
        return max(self.first.tolist(), default=0)

    def begin_after(self, past: int) -> bool:
        """Whether a row holds nothing but padding in its first `past` slots."""
        return self.last >= past

    def begun(self, seen: Tensor, positions: Tensor | None, past: int) -> "Rows":
        """The same with what new tokens behind `past` slots say of rows that held nothing but padding.

        `seen` [batch, new]: which of them are no padding. `positions` [batch, new]; without them a first token stands at 0.
        """
        new = seen.shape[1]
        leading = torch.where(seen.any(1), seen.int().argmax(1), new)
        first = past + leading
        origin = -first if positions is None else positions.gather(1, leading.clamp_max(new - 1)[:, None])[:, 0] - first
        empty = self.first >= past
        return Rows(torch.where(empty, first, self.first), torch.where(empty, origin, self.origin))

    def require_neighbors(self, seen: Tensor, positions: Tensor, past: int) -> None:
        """Raises `CodecError` where positions [batch, new] of tokens that are `seen` do not follow on from the first's."""
        expected = past + torch.arange(seen.shape[1]) + self.origin[:, None]
        wrong = (seen & (positions != expected)).nonzero()
        if len(wrong):
            row, token = wrong[0].tolist()
            raise CodecError(
                f"sequence {row}: position {int(expected[row, token])} comes next in the live cache, not "
                f"{int(positions[row, token])}: give position_ids that follow on, or make a new cache"
            )

    def select(self, rows: Tensor) -> "Rows":
        """The given rows, each as often as it is named."""
        return Rows(self.first[rows.cpu()], self.origin[rows.cpu()])


def unpadded(batch: int) -> Rows:
    """Rows that begin at slot 0 and position 0."""
    zeros = torch.zeros(batch, dtype=torch.int64)
    return Rows(zeros, zeros)
