"""One layer of `CompressedCache` as transformers calls it; `packed_past.py` has what it stores and when it packs."""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from eigencache.codec.base import sixteen_bit
from eigencache.codec.live.packed_heads import PackedHeads
from eigencache.errors import CodecError, NonFiniteError
from eigencache.kernels.packed.backend import BackendName
from eigencache.models.live_cache.packed_past import PackedPast
from eigencache.models.live_cache.pending import pending
from eigencache.modes import own_modes, uncompiled


class CompressedLayer(PackedPast, DynamicLayer):
    """Layer of a transformers cache whose past is packed.

    `update` returns the window alone. Attention reads the rest from the layer, which it takes from `PendingAttention`.

    Args:
        layer_idx: Index of the layer.
        heads: Encoders of keys and of values.
        sinks: Number of first tokens of every row that stay in 16 bits.
        window: Minimum number of last tokens that stay in 16 bits.
        sliding_window: Length of the layer's sliding window; None if it attends to all tokens.
        backend: Backend that reads packed blocks; None for the fastest one.
        owner: An object that the layers of one cache share; None for a layer without a cache.
    """

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
        DynamicLayer.__init__(self)
        PackedPast.__init__(self, layer_idx, heads, sinks, window, sliding_window)
        self.is_sliding = sliding_window is not None
        self.backend: BackendName | None = backend
        self.owner = object() if owner is None else owner

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Take over dtype and device of the first states, and move the codec to that device."""
        for x, heads in zip((key_states, value_states), self.heads, strict=True):
            heads.require(x, self.layer_idx)
        self.heads = tuple(heads.to(key_states.device) for heads in self.heads)  # type: ignore[assignment]
        self.states_dtype = key_states.dtype
        empty = [x[:, :, :0].to(sixteen_bit(x.dtype)) for x in (key_states, value_states)]
        super().lazy_initialization(key_states, value_states)
        self.keys, self.values = empty

    @uncompiled
    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Add new tokens to the window; if an error is raised, nothing is added.

        Args:
            key_states: Keys of the new tokens [batch, KV heads, new, dim].
            value_states: Values of the new tokens, same shape but for `dim`.
            *args: Ignored; transformers passes arguments of other caches.
            **kwargs: Ignored.

        Returns:
            Keys and values of the window, the new tokens in the model's dtype.

        Raises:
            CodecError: The batch has another size, or attention has not read the tokens of the last update.
            NonFiniteError: A number is too large for 16 bits.
        """
        with own_modes():
            return self._update(key_states, value_states)

    def _update(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if len(key_states) != len(self.window[0]):
            raise CodecError(
                f"the cache has {len(self.window[0])} sequences, but {len(key_states)} were passed: make a new cache for "
                "another batch"
            )
        pending.require_taken(self)
        new = key_states, value_states
        whole = [torch.cat([window.to(x.dtype), x], 2) for window, x in zip(self.window, new, strict=True)]
        rounded = [self._rounded(slot, x.detach()) for slot, x in enumerate(new)]
        self.keys, self.values = (torch.cat(pair, 2) for pair in zip(self.window, rounded, strict=True))
        self.entered = key_states.shape[2]
        pending.put(self)
        return whole[0], whole[1]

    def _rounded(self, slot: int, x: Tensor) -> Tensor:
        """Return x in the window's dtype. Raises `NonFiniteError` if a finite number would become infinite."""
        dtype = self.window[slot].dtype
        if x.dtype != dtype and x.numel():
            largest, limit = float(torch.linalg.vector_norm(x, torch.inf)), torch.finfo(dtype).max
            if limit < largest < torch.inf and torch.tensor(largest, dtype=dtype).isinf():
                raise NonFiniteError(
                    f"layer {self.layer_idx}: {('keys', 'values')[slot]} reach {largest:.3g}, more than the "
                    f"{str(dtype).removeprefix('torch.')} maximum of {limit:g}: load the model with `dtype` bfloat16"
                )
        return x.to(dtype)

    def get_seq_length(self) -> int:
        """Return the number of tokens read."""
        return self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return length and offset of what attention reads: sinks, packed blocks and window."""
        return self.length + query_length - self.dropped, self.dropped

    def reset(self) -> None:
        """Remove all tokens."""
        self.clear()
        self.is_initialized = False
        super().reset()

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row of the batch."""
        if self.is_initialized:
            self.select(torch.arange(len(self.window[0])).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows of the batch with these indices."""
        self.select(indices)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder rows for beam search."""
        self.select(beam_idx)
