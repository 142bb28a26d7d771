"""A transformers cache that stores everything older than a window in encoded form only, to measure the loss of a codec.

`MeasuringCache` is a drop-in replacement for `DynamicCache`. In the first layer of a forward pass, it encodes the tokens
that have left the window, for all layers at once, and drops the originals. Attention reads the decoded tokens. All rows of a
batch must have equal positions, because a cache does not know about padding.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from eigencache.codec.base import Codec, EncodedStretch
from eigencache.errors import CodecError, UnsupportedArchitectureError


class _MeasuringLayer(DynamicLayer):
    """Window of one layer; its cache supplies the older tokens, decoded."""

    is_croppable = False

    def __init__(self, owner: "MeasuringCache", layer_idx: int, sliding_window: int | None) -> None:
        super().__init__()
        self.owner, self.layer_idx, self.sliding_window = owner, layer_idx, sliding_window
        self.is_sliding = sliding_window is not None
        self.encoded_length = 0

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Add tokens to the window, and return the decoded past with the window."""
        past = self.owner.past(self.layer_idx)
        keys, values = super().update(key_states, value_states)
        if past is not None:
            keys, values = (torch.cat(pair, dim=-2) for pair in zip(past, (keys, values), strict=True))
        visible = self.get_mask_sizes(key_states.shape[-2], new=0)[0]
        return keys[..., -visible:, :], values[..., -visible:, :]

    def get_seq_length(self) -> int:
        """Return the number of tokens read, encoded ones included."""
        return self.encoded_length + super().get_seq_length()

    def get_mask_sizes(self, query_length: int, new: int | None = None) -> tuple[int, int]:
        """Return length and offset of what `update` returns; `new`: tokens not added yet, by default `query_length`."""
        length = self.get_seq_length() + (query_length if new is None else new)
        visible = length if self.sliding_window is None else min(length, self.sliding_window - 1 + query_length)
        return visible, length - visible

    def crop(self, tokens_to_remove: int) -> None:
        """Raise `CodecError`: encoded tokens cannot be removed."""
        raise CodecError("an encoded cache cannot be cropped: use a decoding strategy that never removes tokens")

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        self.owner.select(torch.arange(self.keys.shape[0]).repeat_interleave(repeats), self.layer_idx)  # type: ignore[union-attr]

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows."""
        self.owner.select(indices, self.layer_idx)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder rows for beam search."""
        self.owner.select(beam_idx, self.layer_idx)


class MeasuringCache(DynamicCache):
    """Cache that stores tokens older than a window encoded by a codec.

    `model.generate(**inputs, past_key_values=MeasuringCache(model, codec))` works for batches without padding.

    Args:
        model: Model whose cache it replaces.
        codec: Codec that encodes old tokens.
        window: Number of last tokens that are not encoded.
        block: Minimum number of tokens that are encoded together.

    Raises:
        UnsupportedArchitectureError: The model caches more than keys and values per token.
    """

    def __init__(self, model: PreTrainedModel, codec: Codec, *, window: int = 0, block: int = 1) -> None:
        super().__init__(config=model.config)
        self.codec, self.window, self.block = codec, window, block
        self.blocks: list[EncodedStretch] = []
        self._coded: dict[int, _MeasuringLayer] = {}
        for layer_idx, layer in enumerate(self.layers):
            if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
                if hasattr(layer, "update"):
                    raise UnsupportedArchitectureError(
                        f"{model.config.model_type}: layer {layer_idx} has a {type(layer).__name__}, not keys and values, "
                        "and cannot be encoded"
                    )
                continue
            self.layers[layer_idx] = self._coded[layer_idx] = _MeasuringLayer(
                self, layer_idx, getattr(layer, "sliding_window", None)
            )
        self._decoded: dict[int, tuple[Tensor, Tensor]] = {}

    def past(self, layer_idx: int) -> tuple[Tensor, Tensor] | None:
        """Return the decoded past of a layer; the call for the first layer encodes and decodes for all layers."""
        filled = [layer for layer in self._coded.values() if layer.get_seq_length()]
        if not filled:
            return None
        if layer_idx == filled[0].layer_idx:
            self._encode_old(filled)
            parts = [self.codec.decode(block) for block in self.blocks]
            self._decoded = (
                {i: tuple(torch.cat([p[i][s] for p in parts], -2) for s in (0, 1)) for i in parts[0]} if parts else {}
            )  # type: ignore[misc]
        return self._decoded.pop(layer_idx, None)

    def _encode_old(self, layers: list[_MeasuringLayer]) -> None:
        start = layers[0].encoded_length
        old = layers[0].get_seq_length() - start - self.window
        if old < max(1, self.block):
            return
        cached = {layer.layer_idx: (layer.keys[..., :old, :], layer.values[..., :old, :]) for layer in layers}  # type: ignore[index]
        self.blocks.append(self.codec.encode(cached, start))
        for layer in layers:
            layer.keys, layer.values = (x[..., old:, :].clone() for x in (layer.keys, layer.values))  # type: ignore[union-attr]
            layer.encoded_length += old

    def select(self, rows: Tensor, layer_idx: int) -> None:
        """Select rows of the batch in the window of a layer, and in the encoded past if it is the first layer."""
        layer = self._coded[layer_idx]
        if layer.get_seq_length() - layer.encoded_length:
            layer.keys, layer.values = (x[rows.to(x.device)] for x in (layer.keys, layer.values))  # type: ignore[union-attr]
        if layer_idx == min(self._coded):
            self.blocks = [block.select(rows) for block in self.blocks]

    @property
    def nbytes(self) -> int:
        """Bytes of the encoded tokens and of the windows."""
        windows = [x for layer in self._coded.values() for x in (layer.keys, layer.values) if x is not None]
        return sum(block.nbytes for block in self.blocks) + sum(x.untyped_storage().nbytes() for x in windows)


def plain_cache(model: PreTrainedModel, cached: dict[int, tuple[Tensor, Tensor]]) -> DynamicCache:
    """Return a `DynamicCache` with the given keys and values of every layer."""
    cache = DynamicCache(config=model.config)
    for layer_idx, (keys, values) in cached.items():
        cache.update(keys, values, layer_idx)
    return cache
