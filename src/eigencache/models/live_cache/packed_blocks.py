"""Packed blocks of one layer: storage that grows without copying the past."""

from dataclasses import dataclass

import torch
from torch import Tensor

_GROWTH = 8  # a new chunk has room for an eighth of the existing blocks, so at most an eighth of the storage is empty
_MOST = 64  # largest number of spare blocks in a new chunk


@dataclass
class Chunk:
    """Storage of some blocks.

    Attributes:
        keys: Bytes of keys, uint8 [batch, capacity, bytes].
        values: Bytes of values, same shape.
        filled: Number of blocks at the beginning that are in use.
    """

    keys: Tensor
    values: Tensor
    filled: int

    def slot(self, slot: int) -> Tensor:
        """Return the blocks in use, of keys (0) or values (1)."""
        return (self.keys, self.values)[slot][:, : self.filled]

    def fill(self, keys: Tensor, values: Tensor) -> None:
        """Append blocks to those in use; there must be room for them."""
        stop = self.filled + keys.shape[1]
        with torch.inference_mode():  # so that chunks of a cache that was copied in inference mode can be written too
            self.keys[:, self.filled : stop], self.values[:, self.filled : stop] = keys, values
        self.filled = stop


class PackedBlocks:
    """Packed blocks of one layer in chunks; appending never moves a block."""

    def __init__(self, chunks: list[Chunk] | None = None) -> None:
        self.chunks: list[Chunk] = chunks or []

    @property
    def count(self) -> int:
        """Number of blocks."""
        return sum(chunk.filled for chunk in self.chunks)

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Append blocks [batch, blocks, bytes]; if memory runs out, nothing has changed."""
        count, last = keys.shape[1], self.chunks[-1] if self.chunks else None
        fits = 0 if last is None else min(last.keys.shape[1] - last.filled, count)
        if fits < count:
            capacity = max(count - fits, min(_MOST, max(1, (self.count + fits) // _GROWTH)))
            fresh = [x.new_empty(x.shape[0], capacity, x.shape[2]) for x in (keys, values)]
            self.chunks.append(Chunk(fresh[0], fresh[1], 0))
        if last is not None:
            last.fill(keys[:, :fits], values[:, :fits])
        if fits < count:
            self.chunks[-1].fill(keys[:, fits:], values[:, fits:])

    def last(self, count: int) -> list[Tensor]:
        """Return the last `count` blocks of keys and of values; they must lie in the last chunk."""
        last = self.chunks[-1]
        return [last.slot(slot)[:, last.filled - count :] for slot in (0, 1)]

    def remove_last(self, count: int) -> None:
        """Remove the last `count` blocks; they must lie in the last chunk."""
        self.chunks[-1].filled -= count
        if not self.chunks[-1].filled:
            self.chunks.pop()

    def select(self, rows: Tensor) -> "PackedBlocks":
        """Return a copy with the given rows of the batch."""
        return PackedBlocks([Chunk(chunk.keys[rows], chunk.values[rows], chunk.filled) for chunk in self.chunks])
