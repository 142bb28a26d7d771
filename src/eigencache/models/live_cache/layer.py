"""One layer of the live cache: first tokens and a window in 16 bits, between them blocks of 64 tokens, bit-packed.

Tokens enter the window. After the layer's attention (`compressed_attention.py`) whole blocks leave it and are packed.
Blocks are added to storages of their own, so that the past is not copied when it grows.
"""

from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from eigencache.codec.base import sixteen_bit, storage_bytes
from eigencache.codec.live.packed_heads import PackedHeads
from eigencache.errors import CodecError, NonFiniteError
from eigencache.kernels.packed.backend import BackendName
from eigencache.kernels.packed.format import BLOCK
from eigencache.models.live_cache.rows import Rows, unpadded
from eigencache.models.live_cache.sinks import Sinks, no_sinks
from eigencache.modes import own_modes, uncompiled

_GROWTH = 8  # a new storage has room for an eighth of the blocks there are, so that at most that much is empty
_MOST = 64  # blocks of room in a new storage
updated: ContextVar["CompressedLayer | None"] = ContextVar("updated", default=None)  # whose attention comes next


@dataclass
class Chunk:
    """Storages of some blocks, `keys` and `values` [batch, capacity, bytes], of which the first `filled` hold something."""

    keys: Tensor
    values: Tensor
    filled: int

    def slot(self, slot: int) -> Tensor:
        """What is filled of keys (0) or values (1)."""
        return (self.keys, self.values)[slot][:, : self.filled]

    def fill(self, keys: Tensor, values: Tensor) -> None:
        """Put blocks behind those there are."""
        stop = self.filled + keys.shape[1]
        with torch.inference_mode():  # in which a chunk of a copy that was made there can be written too
            self.keys[:, self.filled : stop], self.values[:, self.filled : stop] = keys, values
        self.filled = stop


def _require_read(layer: "CompressedLayer") -> None:
    """Raises `CodecError` where the attention of this layer, or of the one that was updated last, did not read the cache."""
    last = updated.get()
    for one in (layer, last if last is not None and last.owner is layer.owner else None):
        if one is not None and one.entered:
            updated.set(None)
            one.crop(-one.entered)
            raise CodecError(
                f"layer {one.layer_idx}: its attention did not read the compressed cache, which was made for another model: "
                "make a CompressedCache for this one"
            )


class CompressedLayer(DynamicLayer):
    """One layer: sinks, chunks of blocks, and the window, which `keys` and `values` are, in 16 bits."""

    is_croppable = True

    def __init__(
        self,
        layer_idx: int,
        heads: tuple[PackedHeads, PackedHeads],
        sinks: int,
        window: int,
        sliding_window: int | None,
        *,
        backend: BackendName | None = None,
        owner: object = None,
    ) -> None:
        super().__init__()
        self.backend: BackendName | None = backend
        self.owner = object() if owner is None else owner  # what layers of a cache share
        self.layer_idx, self.heads, self.wanted_sinks, self.least_window = layer_idx, heads, sinks, window
        self.sliding_window, self.is_sliding = sliding_window, sliding_window is not None
        self.turns = self.watches_positions = any(one.rotated_mean for one in heads)
        self._clear()

    def _clear(self) -> None:
        self.chunks: list[Chunk] = []
        self.sinks: Sinks | None = None
        self.led = 0  # first slots of all rows that left the window for the sinks
        self.rows: Rows | None = None  # where they begin
        self.dropped = 0  # first tokens that no token will attend to any more
        self.entered = 0  # tokens of the window that entered last

    @property
    def blocks(self) -> int:
        """Blocks that are held."""
        return sum(chunk.filled for chunk in self.chunks)

    @property
    def padded(self) -> bool:
        """Whether a row begins with padding."""
        return self.rows is not None and self.rows.last > 0

    @property
    def window(self) -> tuple[Tensor, Tensor]:
        """Last tokens in 16 bits, of a layer that has seen any."""
        assert self.keys is not None and self.values is not None
        return self.keys, self.values

    @property
    def window_count(self) -> int:
        """How many those are."""
        return self.window[0].shape[2] if self.is_initialized else 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """The model's dtype and device, an empty window, and the codec where the states are."""
        for x, heads in zip((key_states, value_states), self.heads, strict=True):
            heads.require(x, self.layer_idx)
        self.heads = tuple(heads.to(key_states.device) for heads in self.heads)  # type: ignore[assignment]
        self.states_dtype = key_states.dtype
        empty = [x[:, :, :0].to(sixteen_bit(x.dtype)) for x in (key_states, value_states)]
        super().lazy_initialization(key_states, value_states)
        self.keys, self.values = empty

    @uncompiled
    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Add to the window, which comes back with the new tokens as exact as they came. Attention knows of the rest.

        Raises `CodecError` for another batch and where attention did not read the cache, `NonFiniteError` for numbers that
        16 bits do not hold. Nothing is added then, nor when memory runs out.
        """
        with own_modes():
            return self._update(key_states, value_states)

    def _update(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if len(key_states) != len(self.window[0]):
            raise CodecError(
                f"the cache holds {len(self.window[0])} sequences, {len(key_states)} are added: "
                "make a new one for another batch"
            )
        _require_read(self)
        new = key_states, value_states
        whole = [torch.cat([held.to(x.dtype), x], 2) for held, x in zip(self.window, new, strict=True)]
        rounded = [self._rounded(slot, x.detach()) for slot, x in enumerate(new)]
        self.keys, self.values = (torch.cat(pair, 2) for pair in zip(self.window, rounded, strict=True))
        self.entered = key_states.shape[2]
        updated.set(self)
        return whole[0], whole[1]

    def _rounded(self, slot: int, x: Tensor) -> Tensor:
        """x as the window holds it. Raises `NonFiniteError` where a finite number would become infinite."""
        dtype = self.window[slot].dtype
        if x.dtype != dtype and x.numel():
            largest, ends = float(torch.linalg.vector_norm(x, torch.inf)), torch.finfo(dtype).max
            if ends < largest < torch.inf and torch.tensor(largest, dtype=dtype).isinf():
                raise NonFiniteError(
                    f"layer {self.layer_idx} stores {('keys', 'values')[slot]} up to {largest:.3g}, the window's "
                    f"{str(dtype).removeprefix('torch.')} ends at {ends:g}: load the model in bfloat16"
                )
        return x.to(dtype)

    def place(self, seen: Tensor | None, positions: Tensor | None) -> None:
        """Rows may begin with padding and at any position: learned from the tokens that entered last.

        `seen` [batch, new]: which of them are no padding, None for all. `positions` [batch or 1, new] where the model tells
        its attention; else a row's first token stands at 0. Blocks know where their first token stands, and only keys whose
        mean turns need that: the first such layer of a cache raises `CodecError` where positions do not follow on.
        """
        batch, new = len(self.window[0]), self.entered
        past, rows = self.get_seq_length() - new, self.rows or unpadded(batch)
        begins = rows.begin_after(past)
        if not new or not (begins or self.watches_positions):
            return
        seen = torch.ones(batch, new, dtype=torch.bool) if seen is None else seen.cpu().expand(batch, -1)
        given = None
        if self.turns and positions is not None and positions.ndim == 2 and positions.shape[1] == new:
            given = positions.cpu().expand(batch, -1)
        if begins:
            self.rows = rows = rows.begun(seen, given, past)
        if given is not None and self.watches_positions:
            rows.require_neighbors(seen, given, past)

    def compact(self) -> None:
        """Pack what has left the window. Raises `NonFiniteError` naming the layer; nothing is lost then.

        Neither is anything when memory runs out: what is new is made before what is old is let go.
        """
        self.entered = 0
        self._take_sinks()
        count = max(0, self.window_count - self.least_window) // BLOCK
        if not count:
            return
        stored = [x[:, :, : count * BLOCK] for x in self.window]
        for what, x in zip(("keys", "values"), stored, strict=True):
            if not x.isfinite().all():
                raise NonFiniteError(f"layer {self.layer_idx} stores NaN or infinite {what}: try `dtype` float32")
        positions = self._positions(self.blocks, count)
        packed = [heads.encode(x, positions) for heads, x in zip(self.heads, stored, strict=True)]
        left = self._without(count * BLOCK)
        self._append(packed[0], packed[1])
        self.keys, self.values = left
        self._drop()

    @property
    def _after_sinks(self) -> int:
        """The slot behind every row's first tokens."""
        return (0 if self.rows is None else self.rows.last) + self.wanted_sinks

    def _take_sinks(self) -> None:
        """Hold first tokens of rows in 16 bits. The first slots of all leave the window for that, others are packed too."""
        stop, length = self._after_sinks, self.get_seq_length()
        seen = 0 if self.sinks is None else self.sinks.seen
        if not self.wanted_sinks or self.dropped >= stop or seen >= min(stop, length):
            return
        sinks = no_sinks(self.window, self.wanted_sinks) if self.sinks is None else self.sinks
        rows = self.rows or unpadded(len(self.window[0]))
        sinks = sinks.with_tokens(self.window, length, rows.first)
        leading = 0 if self.blocks or self.dropped else min(self.window_count, self.wanted_sinks - self.led)
        window = self._without(leading) if leading else self.window
        self.sinks, self.led, (self.keys, self.values) = sinks, self.led + leading, window

    def starts(self, block: int, count: int) -> Tensor:
        """Position of the first token of `count` blocks from `block` on, row by row [batch, count]."""
        slots = self.dropped + self.led + BLOCK * (block + torch.arange(count))
        rows = self.rows or unpadded(len(self.window[0]))
        return slots[None] + rows.origin[:, None]

    def _positions(self, block: int, count: int) -> Tensor:
        """Of every token of those blocks [batch, tokens]."""
        return (self.starts(block, count)[..., None] + torch.arange(BLOCK)).flatten(1)

    def _append(self, keys: Tensor, values: Tensor) -> None:
        """Put blocks into the room there is, the rest into a new chunk, which is made first."""
        count, last = keys.shape[1], self.chunks[-1] if self.chunks else None
        fits = 0 if last is None else min(last.keys.shape[1] - last.filled, count)
        if fits < count:
            room = max(count - fits, min(_MOST, max(1, (self.blocks + fits) // _GROWTH)))
            fresh = [x.new_empty(x.shape[0], room, x.shape[2]) for x in (keys, values)]
            self.chunks.append(Chunk(fresh[0], fresh[1], 0))
        if last is not None:
            last.fill(keys[:, :fits], values[:, :fits])
        if fits < count:
            self.chunks[-1].fill(keys[:, fits:], values[:, fits:])

    def _without(self, count: int) -> list[Tensor]:
        """The window without its first tokens, in storages of its own."""
        return [x[:, :, count:].clone() for x in self.window]

    def _drop(self) -> None:
        """Forget sinks and chunks that a sliding window has left behind by more than a block: a crop may come back."""
        if self.sliding_window is None:
            return
        while self.chunks and BLOCK * (self.blocks - self.chunks[0].filled - 1) + self.window_count >= self.sliding_window:
            self.dropped += self.led + BLOCK * self.chunks.pop(0).filled
            self.led = 0
        if self.dropped >= self._after_sinks:
            self.sinks = None

    def get_seq_length(self) -> int:
        """Tokens seen so far."""
        return self.dropped + self.led + BLOCK * self.blocks + self.window_count

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of what is attended to: sinks and everything that is still held."""
        return self.get_seq_length() + query_length - self.dropped, self.dropped

    def reset(self) -> None:
        """Forget everything."""
        self.keys = self.values = None
        self.is_initialized = False
        super().reset()
        self._clear()

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens, −`tokens_to_remove` of them. Blocks that are cut are unpacked into the window."""
        if tokens_to_remove > 0:
            raise ValueError(f"crop({tokens_to_remove}): give the tokens to remove as a negative number")
        count = min(-tokens_to_remove, self.get_seq_length())
        self.entered = 0
        while count > self.window_count and self.chunks:
            self._unpack_last(-(-(count - self.window_count) // BLOCK))
        if count > self.window_count + self.led:
            raise CodecError(f"{count} tokens are to be forgotten, of which a sliding window holds no longer all")
        if not self.is_initialized:
            return
        leading = max(0, count - self.window_count)
        left = self.window_count - (count - leading)
        window = [x[:, :, :left].clone() for x in self.window]
        sinks = self.sinks and self.sinks.cropped(self.get_seq_length() - count)
        self.sinks, self.led, (self.keys, self.values) = sinks, self.led - leading, window

    def _unpack_last(self, count: int) -> None:
        last = self.chunks[-1]
        count = min(count, last.filled)
        positions = self._positions(self.blocks - count, count)
        again = [heads.decode(last.slot(slot)[:, last.filled - count :], positions) for slot, heads in enumerate(self.heads)]
        self.keys, self.values = (torch.cat([x.to(held.dtype), held], 2) for x, held in zip(again, self.window, strict=True))
        last.filled -= count
        if not last.filled:
            self.chunks.pop()

    def select(self, rows: Tensor) -> None:
        """The given rows of the batch, each as often as it is named."""
        if not self.is_initialized or torch.equal(rows.cpu(), torch.arange(len(self.window[0]))):
            return
        at = rows.to(self.window[0].device)
        window = [x[at] for x in self.window]
        chunks = [Chunk(chunk.keys[at], chunk.values[at], chunk.filled) for chunk in self.chunks]
        sinks, begun = self.sinks and self.sinks.select(at), self.rows and self.rows.select(rows)
        (self.keys, self.values), self.chunks, self.sinks, self.rows = window, chunks, sinks, begun

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        if self.is_initialized:
            self.select(torch.arange(len(self.window[0])).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows."""
        self.select(indices)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder rows for beam search."""
        self.select(beam_idx)

    @property
    def nbytes(self) -> int:
        """Bytes of all storages that exist because of the layer."""
        return storage_bytes(t for tensors in self.tensors().values() for t in tensors)

    def tensors(self) -> dict[str, list[Tensor]]:
        """All that is held, by what it is."""
        return {
            "sinks": [] if self.sinks is None else [self.sinks.keys, self.sinks.values],
            "keys": [chunk.keys for chunk in self.chunks],
            "values": [chunk.values for chunk in self.chunks],
            "window": list(self.window) if self.is_initialized else [],
        }
