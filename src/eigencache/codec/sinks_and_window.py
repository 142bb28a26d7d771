"""First and most recent tokens held apart in more bits, the rest by a codec; all of it counted.

How published methods treat attention sinks and the recent window: `sinks` tokens from position 0 and the last `window`
of every stretch, in 16 bits or in fp8 (e4m3, one float16 scale per layer, head and token).
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from eigencache.codec.base import Cached, Codec, Encoded, EncodedStretch, SixteenBit, length_of, owned
from eigencache.codec.quantization.grouped import scale_reaching
from eigencache.errors import CodecError

FIRST_EXACT = 4  # first tokens that codecs keep in 16 bits: all heads attend to them, and their keys and values are small
_FP8_MAX = 448.0


def middle_of(tokens: int, start: int, sinks: int, window: int) -> tuple[int, int]:
    """From and up to which of `tokens` tokens nothing is kept apart, when the first stands at position `start`."""
    first = min(tokens, max(0, sinks - start))
    return first, max(first, tokens - window)


@dataclass(frozen=True, eq=False)
class Pieces:
    """Sinks, coded tokens and window of one stretch, one after the other; what is empty is absent."""

    parts: tuple[tuple[str, EncodedStretch], ...]  # which codec holds it: sinks, coded or window
    start: int
    tokens: int

    @property
    def nbytes(self) -> int:
        """Bytes of all three."""
        return sum(part.nbytes for _, part in self.parts)

    def select(self, rows: Tensor) -> "Pieces":
        """The given rows of the batch."""
        return Pieces(tuple((role, part.select(rows)) for role, part in self.parts), self.start, self.tokens)


@dataclass(frozen=True, eq=False)
class WithSinksAndWindow:
    """`codec` for all but the first `sinks` positions and the last `window` tokens of a stretch."""

    codec: Codec
    dtype: torch.dtype  # of the model
    sinks: int = 0
    window: int = 0
    sink_format: Literal["16 bit", "fp8"] = "16 bit"

    @property
    def name(self) -> str:
        """The codec's own."""
        return self.codec.name

    @property
    def nbytes(self) -> int:
        """Of the codec, held once."""
        return self.codec.nbytes

    def encode(self, cached: Cached, start: int) -> Pieces:
        """Each piece by what holds it. Raises what the codec raises."""
        tokens = length_of(cached)
        first, last = middle_of(tokens, start, self.sinks, self.window)
        parts = []
        for role, a, b in (("sinks", 0, first), ("coded", first, last), ("window", last, tokens)):
            if b > a:
                piece = {i: (keys[:, :, a:b], values[:, :, a:b]) for i, (keys, values) in cached.items()}
                parts.append((role, self._codec(role).encode(piece, start + a)))
        return Pieces(tuple(parts), start, tokens)

    def decode(self, encoded: Pieces) -> dict[int, tuple[Tensor, Tensor]]:
        """All tokens again, in the model's dtype."""
        decoded = [self._codec(role).decode(part) for role, part in encoded.parts]
        return {i: tuple(torch.cat([d[i][s].to(self.dtype) for d in decoded], 2) for s in (0, 1)) for i in decoded[0]}  # type: ignore[misc]

    def _codec(self, role: str) -> Any:
        if role == "coded":
            return self.codec
        return Fp8(self.dtype) if role == "sinks" and self.sink_format == "fp8" else SixteenBit(self.dtype)


@dataclass(frozen=True)
class Fp8:
    """The cache in e4m3, one byte per number, and a float16 scale per layer, head and token."""

    dtype: torch.dtype
    name: str = "fp8"
    nbytes: int = 0

    def encode(self, cached: Cached, start: int) -> Encoded:
        """Codes and scales. Raises `CodecError` for NaN and for numbers beyond float16 scales."""
        tensors = {}
        for layer_idx, both in cached.items():
            for slot, x in enumerate(both):
                largest = x.abs().amax(-1, keepdim=True).float()
                scale = scale_reaching(largest, _FP8_MAX)
                if not (scale.isfinite().all() and x.isfinite().all()):
                    raise CodecError(f"layer {layer_idx} holds numbers that do not fit into fp8 with float16 scales")
                codes = x.float() / torch.where(scale > 0, scale, 1).float()
                tensors[f"{layer_idx}.{slot}.codes"] = owned(codes.to(torch.float8_e4m3fn).view(torch.uint8))
                tensors[f"{layer_idx}.{slot}.scale"] = owned(scale)
        return Encoded(tensors, start, length_of(cached))

    def decode(self, encoded: Encoded) -> dict[int, tuple[Tensor, Tensor]]:
        """Both slots in the model's dtype."""
        layers = dict.fromkeys(int(name.split(".")[0]) for name in encoded.tensors)
        return {i: tuple(self._slot(encoded, f"{i}.{slot}") for slot in (0, 1)) for i in layers}  # type: ignore[misc]

    def _slot(self, encoded: Encoded, name: str) -> Tensor:
        codes = encoded.tensors[f"{name}.codes"].view(torch.float8_e4m3fn).float()
        return (codes * encoded.tensors[f"{name}.scale"].float()).to(self.dtype)
