"""What one layer of `CompressedCache` stores, and when tokens are packed; independent of transformers.

A layer stores its first tokens (sinks) and its last tokens (the window) in 16 bits, and the tokens in between as packed
blocks of 64. New tokens enter the window; `compact` packs the whole blocks that have left it.
"""

import torch
from torch import Tensor

from eigencache.codec.base import storage_bytes
from eigencache.codec.live.packed_heads import PackedHeads
from eigencache.errors import CodecError, NonFiniteError
from eigencache.kernels.packed.format import BLOCK
from eigencache.models.live_cache.packed_blocks import Chunk, PackedBlocks
from eigencache.models.live_cache.rows import Rows, unpadded
from eigencache.models.live_cache.sinks import Sinks, no_sinks


class PackedPast:
    """Sinks, packed blocks and window of one layer.

    All changes are made as a whole: if memory runs out or a number is not finite, the tokens are still there.

    Attributes:
        layer_idx: Index of the layer.
        heads: Encoders of keys and of values.
        wanted_sinks: Number of first tokens of every row that stay in 16 bits.
        least_window: Minimum number of last tokens that stay in 16 bits.
        sliding_window: Length of the layer's sliding window; None if it attends to all tokens.
        keys: Keys of the window in 16 bits [batch, KV heads, tokens, dim]; None before the first token.
        values: Values of the window, same shape.
        packed: Packed blocks.
        sinks: Sinks; None if there are none yet, or none any more.
        led: Number of first slots that are stored as sinks for all rows and are not packed.
        rows: Where the rows begin; None while every row begins at slot 0.
        dropped: Number of first slots that were dropped because no further token attends to them.
        entered: Number of tokens of the window that attention has not read yet.
        watches_positions: Whether this layer checks positions, as one layer of a cache with rotated means must.
    """

    keys: Tensor | None
    values: Tensor | None

    def __init__(
        self,
        layer_idx: int,
        heads: tuple[PackedHeads, PackedHeads],
        sinks: int,
        window: int,
        sliding_window: int | None,
    ) -> None:
        self.layer_idx, self.heads, self.wanted_sinks, self.least_window = layer_idx, heads, sinks, window
        self.sliding_window = sliding_window
        self.has_rotated_mean = self.watches_positions = any(slot.rotated_mean for slot in heads)
        self.clear()

    def clear(self) -> None:
        """Remove all tokens."""
        self.keys = self.values = None
        self.packed = PackedBlocks()
        self.sinks: Sinks | None = None
        self.led = 0
        self.rows: Rows | None = None
        self.dropped = 0
        self.entered = 0

    @property
    def chunks(self) -> list[Chunk]:
        """Storage of the packed blocks."""
        return self.packed.chunks

    @property
    def blocks(self) -> int:
        """Number of packed blocks."""
        return self.packed.count

    @property
    def padded(self) -> bool:
        """Whether a row begins with padding."""
        return self.rows is not None and self.rows.last > 0

    @property
    def window(self) -> tuple[Tensor, Tensor]:
        """Keys and values of the window; the layer must have been initialized."""
        assert self.keys is not None and self.values is not None
        return self.keys, self.values

    @property
    def window_count(self) -> int:
        """Number of tokens in the window."""
        return 0 if self.keys is None else self.keys.shape[2]

    @property
    def length(self) -> int:
        """Number of tokens read, dropped ones included."""
        return self.dropped + self.led + BLOCK * self.blocks + self.window_count

    def place(self, seen: Tensor | None, positions: Tensor | None) -> None:
        """Find out from the newest tokens where rows begin: after padding, and at any position.

        Packed blocks only store the position of their first token, which matters for rotated means alone.

        Args:
            seen: Whether each new token is no padding [batch, new]; None for no padding.
            positions: Positions of the new tokens [batch or 1, new]; None if the model does not pass them to its attention,
                and then the first token of a row has position 0.

        Raises:
            CodecError: Positions are not consecutive; checked in the first layer of a cache that has a rotated mean.
        """
        batch, new = len(self.window[0]), self.entered
        past, rows = self.length - new, self.rows or unpadded(batch)
        begins = rows.begin_after(past)
        if not new or not (begins or self.watches_positions):
            return
        seen = torch.ones(batch, new, dtype=torch.bool) if seen is None else seen.cpu().expand(batch, -1)
        given = None
        if self.has_rotated_mean and positions is not None and positions.ndim == 2 and positions.shape[1] == new:
            given = positions.cpu().expand(batch, -1)
        if begins:
            self.rows = rows = rows.begun(seen, given, past)
        if given is not None and self.watches_positions:
            rows.require_neighbors(seen, given, past)

    def compact(self) -> None:
        """Pack the whole blocks that have left the window.

        Raises:
            NonFiniteError: A token to be packed is NaN or infinite.
        """
        self.entered = 0
        self._take_sinks()
        count = max(0, self.window_count - self.least_window) // BLOCK
        if not count:
            return
        leaving = [x[:, :, : count * BLOCK] for x in self.window]
        for what, x in zip(("keys", "values"), leaving, strict=True):
            if not x.isfinite().all():
                raise NonFiniteError(
                    f"layer {self.layer_idx}: {what} contain NaN or infinite numbers: load the model with `dtype` float32"
                )
        positions = self.positions(self.blocks, count)
        packed = [heads.encode(x, positions) for heads, x in zip(self.heads, leaving, strict=True)]
        left = self._window_after(count * BLOCK)
        self.packed.append(packed[0], packed[1])
        self.keys, self.values = left
        self._drop()

    @property
    def _after_sinks(self) -> int:
        """Slot after the sinks of every row."""
        return (0 if self.rows is None else self.rows.last) + self.wanted_sinks

    def _take_sinks(self) -> None:
        """Store the first tokens of rows in 16 bits; slots that are sinks of all rows leave the window."""
        stop, length = self._after_sinks, self.length
        seen = 0 if self.sinks is None else self.sinks.seen
        if not self.wanted_sinks or self.dropped >= stop or seen >= min(stop, length):
            return
        sinks = no_sinks(self.window, self.wanted_sinks) if self.sinks is None else self.sinks
        rows = self.rows or unpadded(len(self.window[0]))
        sinks = sinks.with_tokens(self.window, length, rows.first)
        leading = 0 if self.blocks or self.dropped else min(self.window_count, self.wanted_sinks - self.led)
        window = self._window_after(leading) if leading else self.window
        self.sinks, self.led, (self.keys, self.values) = sinks, self.led + leading, window

    def starts(self, block: int, count: int) -> Tensor:
        """Return the position of the first token of `count` blocks from `block` on [batch, count]."""
        slots = self.dropped + self.led + BLOCK * (block + torch.arange(count))
        rows = self.rows or unpadded(len(self.window[0]))
        return slots[None] + rows.origin[:, None]

    def positions(self, block: int, count: int) -> Tensor:
        """Return the position of every token of `count` blocks from `block` on [batch, 64 · count]."""
        return (self.starts(block, count)[..., None] + torch.arange(BLOCK)).flatten(1)

    def _window_after(self, count: int) -> list[Tensor]:
        """Return a copy of the window without its first tokens."""
        return [x[:, :, count:].clone() for x in self.window]

    def _drop(self) -> None:
        """Drop sinks and chunks more than a block before a sliding window; the block allows for a crop."""
        if self.sliding_window is None:
            return
        while self.chunks and BLOCK * (self.blocks - self.chunks[0].filled - 1) + self.window_count >= self.sliding_window:
            self.dropped += self.led + BLOCK * self.chunks.pop(0).filled
            self.led = 0
        if self.dropped >= self._after_sinks:
            self.sinks = None

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last tokens, and unpack blocks that are cut into the window.

        Args:
            tokens_to_remove: Minus the number of tokens, as transformers passes it.

        Raises:
            ValueError: `tokens_to_remove` is positive.
            CodecError: Tokens that would be in the window again have been dropped.
        """
        if tokens_to_remove > 0:
            raise ValueError(f"`tokens_to_remove` is {tokens_to_remove}: pass the number of tokens as a negative number")
        count = min(-tokens_to_remove, self.length)
        self.entered = 0
        while count > self.window_count and self.chunks:
            self._unpack_last(-(-(count - self.window_count) // BLOCK))
        if count > self.window_count + self.led:
            raise CodecError(
                f"layer {self.layer_idx}: cannot crop {count} tokens, because some of them have left the sliding window: "
                "make a new cache"
            )
        if self.keys is None:
            return
        leading = max(0, count - self.window_count)
        left = self.window_count - (count - leading)
        window = [x[:, :, :left].clone() for x in self.window]
        sinks = self.sinks and self.sinks.cropped(self.length - count)
        self.sinks, self.led, (self.keys, self.values) = sinks, self.led - leading, window

    def _unpack_last(self, count: int) -> None:
        """Unpack the last blocks into the window, at most those of the last chunk."""
        count = min(count, self.chunks[-1].filled)
        positions = self.positions(self.blocks - count, count)
        unpacked = [heads.decode(x, positions) for heads, x in zip(self.heads, self.packed.last(count), strict=True)]
        self.keys, self.values = (
            torch.cat([x.to(window.dtype), window], 2) for x, window in zip(unpacked, self.window, strict=True)
        )
        self.packed.remove_last(count)

    def select(self, rows: Tensor) -> None:
        """Keep the rows of the batch with the given indices, in this order; an index may repeat."""
        if self.keys is None or torch.equal(rows.cpu(), torch.arange(len(self.window[0]))):
            return
        indices = rows.to(self.window[0].device)
        window = [x[indices] for x in self.window]
        packed = self.packed.select(indices)
        sinks, begins = self.sinks and self.sinks.select(indices), self.rows and self.rows.select(rows)
        (self.keys, self.values), self.packed, self.sinks, self.rows = window, packed, sinks, begins

    @property
    def nbytes(self) -> int:
        """Bytes of all storages that exist because of the layer."""
        return storage_bytes(t for tensors in self.tensors().values() for t in tensors)

    def tensors(self) -> dict[str, list[Tensor]]:
        """Return all stored tensors by kind: sinks, keys, values, window."""
        return {
            "sinks": [] if self.sinks is None else [self.sinks.keys, self.sinks.values],
            "keys": [chunk.keys for chunk in self.chunks],
            "values": [chunk.values for chunk in self.chunks],
            "window": [] if self.keys is None else list(self.window),
        }
