"""The live codec: bit-packed coefficients per head in blocks of 64 tokens, first and last tokens in 16 bits.

`LiveCodec` encodes a whole prefix at once, which is how it is fitted and compared with other codecs.
`models/live_cache/cache.py` stores the same bytes while a model generates. There is no entropy coding: attention reads the
8-, 4- and 2-bit integers without unpacking them.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from eigencache.codec.base import Cached, Encoded, length_of, to_sixteen_bit
from eigencache.codec.live.packed_heads import PackedHeads
from eigencache.codec.sinks_and_window import middle_of
from eigencache.errors import CodecError
from eigencache.kernels.packed.format import BLOCK


@dataclass(frozen=True, eq=False)
class LiveCodec:
    """Codec of `CompressedCache`.

    Attributes:
        name: Name in tables.
        layers: Layer index → heads of its keys and of its values.
        sinks: Number of first positions that stay in 16 bits.
        window: Minimum number of last tokens that stay in 16 bits; tokens that fill no block stay too.
        dtype: The model's dtype.
        reach: Number of positions, from 0, that the codec was fitted for; None if unknown.
    """

    name: str
    layers: Mapping[int, tuple[PackedHeads, PackedHeads]]
    sinks: int
    window: int
    dtype: torch.dtype
    reach: int | None = None

    def tensors(self) -> Iterable[Tensor]:
        """Yield all stored tensors."""
        for slots in self.layers.values():
            for heads in slots:
                yield from heads.tensors()

    @property
    def nbytes(self) -> int:
        """Bytes of the side information: transforms and means."""
        return sum(t.nbytes for t in self.tensors())

    @property
    def bits_per_value(self) -> float:
        """Bits per value of packed tokens alone."""
        bits, values = self._per_token
        return bits / values

    def nbytes_of(self, tokens: int) -> int:
        """Return the bytes of one sequence of `tokens` tokens from position 0, in layers without a sliding window."""
        first, stop = self.packed_of(tokens, 0)
        bits, values = self._per_token
        return (tokens - (stop - first)) * values * 2 + (stop - first) // 8 * bits

    @property
    def _per_token(self) -> tuple[int, int]:
        """Bits of a packed token, and its number of values, in all layers."""
        all_heads = [heads for slots in self.layers.values() for heads in slots]
        return sum(heads.bits for heads in all_heads), sum(heads.mean.numel() for heads in all_heads)

    def to(self, device: str | torch.device) -> "LiveCodec":
        """Return this codec with all tensors on `device`."""
        layers = {i: (keys.to(device), values.to(device)) for i, (keys, values) in self.layers.items()}
        return replace(self, layers=layers)

    def packed_of(self, tokens: int, start: int) -> tuple[int, int]:
        """Return the slice of tokens that is packed.

        Args:
            tokens: Number of tokens.
            start: Position of the first of them.

        Returns:
            Index of the first packed token, and one past the last; a whole number of blocks lies between them.
        """
        first, stop = middle_of(tokens, start, self.sinks, self.window)
        return first, first + (stop - first) // BLOCK * BLOCK

    def encode(self, cached: Cached, start: int = 0) -> Encoded:
        """Encode the sinks, packed blocks and window of every layer.

        Args:
            cached: Layer index → keys and values [batch, heads, tokens, dim]; a layer may hold the last tokens only.
            start: Position of the first token.

        Raises:
            CodecError: The cache is of another model, or it contains NaN or infinite numbers.
        """
        if other := sorted(cached.keys() ^ self.layers.keys()):
            raise CodecError(
                f"layers {other} exist only in the cache or only in the codec. It was fitted on another model: "
                "fit one on this model"
            )
        tokens, tensors = length_of(cached), {}
        for layer_idx, slots in cached.items():
            begin = start + tokens - slots[0].shape[2]
            first, stop = self.packed_of(slots[0].shape[2], begin)
            for slot, (x, heads) in enumerate(zip(slots, self.layers[layer_idx], strict=True)):
                heads.require(x, layer_idx)
                if not x.isfinite().all():
                    raise CodecError(
                        f"layer {layer_idx}: the cache contains NaN or infinite numbers; load the model in float32"
                    )
                name = f"{layer_idx}.{slot}"
                tensors[f"{name}.sinks"] = to_sixteen_bit(x[:, :, :first], name)
                tensors[f"{name}.window"] = to_sixteen_bit(x[:, :, stop:], name)
                tensors[f"{name}.packed"] = heads.encode(x[:, :, first:stop], _positions(x, begin + first, stop - first))
        return Encoded(tensors, start, tokens)

    def decode(self, encoded: Encoded) -> dict[int, tuple[Tensor, Tensor]]:
        """Return layer index → decoded keys and values in the model's dtype."""
        end = encoded.start + encoded.tokens

        def slot_of(name: str, heads: PackedHeads) -> Tensor:
            sinks, packed, window = (encoded.tensors[f"{name}.{part}"] for part in ("sinks", "packed", "window"))
            count = packed.shape[1] * BLOCK
            x = heads.decode(packed, _positions(packed, end - window.shape[2] - count, count))
            return torch.cat([part.to(self.dtype) for part in (sinks, x, window)], 2)

        return {i: (slot_of(f"{i}.0", keys), slot_of(f"{i}.1", values)) for i, (keys, values) in self.layers.items()}


def _positions(like: Tensor, start: int, count: int) -> Tensor:
    """Return positions [batch, count] from `start` on, on the device of `like`."""
    return torch.arange(start, start + count, device=like.device).expand(len(like), -1)
