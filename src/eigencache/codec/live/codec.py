"""The codec of the live cache: bit-packed coefficients per head in blocks of 64 tokens, the rest in 16 bits.

As a codec it holds a whole prefix at once, which is how it is fitted and compared.
`models/live_cache/cache.py` holds the same bytes while a model generates. There is no entropy coding: attention reads the
integers of 8, 4 and 2 bits without unpacking them.
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
    """Layer → keys and values; `sinks` first tokens and at least `window` last ones are not packed.

    `reach`: positions that it was fitted for, from 0 on; None: not known.
    """

    name: str
    layers: Mapping[int, tuple[PackedHeads, PackedHeads]]
    sinks: int
    window: int
    dtype: torch.dtype  # of the model
    reach: int | None = None

    def tensors(self) -> Iterable[Tensor]:
        """All that is held."""
        for both in self.layers.values():
            for heads in both:
                yield from heads.tensors()

    @property
    def nbytes(self) -> int:
        """Bytes of what is held once: transforms, means."""
        return sum(t.nbytes for t in self.tensors())

    @property
    def bits_per_value(self) -> float:
        """Of packed tokens alone."""
        bits = sum(heads.bits for both in self.layers.values() for heads in both)
        return bits / sum(heads.mean.numel() for both in self.layers.values() for heads in both)

    def nbytes_of(self, tokens: int) -> int:
        """Bytes of `tokens` tokens of one sequence from position 0 on, in layers that attend to all of them."""
        first, stop = self.packed_of(tokens, 0)
        values = sum(heads.mean.numel() for both in self.layers.values() for heads in both)
        bits = sum(heads.bits for both in self.layers.values() for heads in both)
        return (tokens - (stop - first)) * values * 2 + (stop - first) // 8 * bits

    def to(self, device: str | torch.device) -> "LiveCodec":
        """The same where the cache is."""
        layers = {i: (keys.to(device), values.to(device)) for i, (keys, values) in self.layers.items()}
        return replace(self, layers=layers)

    def packed_of(self, tokens: int, start: int) -> tuple[int, int]:
        """From and up to which of `tokens` tokens are packed, the first of which stands at position `start`."""
        first, stop = middle_of(tokens, start, self.sinks, self.window)
        return first, first + (stop - first) // BLOCK * BLOCK

    def encode(self, cached: Cached, start: int = 0) -> Encoded:
        """Every layer's sinks, blocks and window. Raises `CodecError` for a cache of another model, NaN and infinity."""
        if other := sorted(cached.keys() ^ self.layers.keys()):
            raise CodecError(f"layers {other}: the cache has other layers, this codec was fitted on another model")
        tokens, tensors = length_of(cached), {}
        for layer_idx, both in cached.items():
            begin = start + tokens - both[0].shape[2]
            first, stop = self.packed_of(both[0].shape[2], begin)
            for slot, (x, heads) in enumerate(zip(both, self.layers[layer_idx], strict=True)):
                heads.require(x, layer_idx)
                if not x.isfinite().all():
                    raise CodecError(f"layer {layer_idx} holds NaN or infinite numbers")
                name = f"{layer_idx}.{slot}"
                tensors[f"{name}.sinks"] = to_sixteen_bit(x[:, :, :first], name)
                tensors[f"{name}.window"] = to_sixteen_bit(x[:, :, stop:], name)
                tensors[f"{name}.packed"] = heads.encode(x[:, :, first:stop], _positions(x, begin + first, stop - first))
        return Encoded(tensors, start, tokens)

    def decode(self, encoded: Encoded) -> dict[int, tuple[Tensor, Tensor]]:
        """The cache again, in the model's dtype."""
        end = encoded.start + encoded.tokens

        def slot_of(name: str, heads: PackedHeads) -> Tensor:
            sinks, packed, window = (encoded.tensors[f"{name}.{part}"] for part in ("sinks", "packed", "window"))
            count = packed.shape[1] * BLOCK
            x = heads.decode(packed, _positions(packed, end - window.shape[2] - count, count))
            return torch.cat([part.to(self.dtype) for part in (sinks, x, window)], 2)

        return {i: (slot_of(f"{i}.0", keys), slot_of(f"{i}.1", values)) for i, (keys, values) in self.layers.items()}


def _positions(like: Tensor, start: int, count: int) -> Tensor:
    """[batch, count] on the device of a tensor."""
    return torch.arange(start, start + count, device=like.device).expand(len(like), -1)
