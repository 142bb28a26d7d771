"""Sinks and a recent window in more bits than the rest: how published methods treat first and last tokens.

`sinks` tokens from position 0 and the last `window` tokens of every stretch are stored in 16 bits or in fp8 (e4m3, one
float16 scale per layer, head and token); a codec stores the rest. All bytes are counted.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from eigencache.codec.base import Cached, Codec, Encoded, EncodedStretch, SixteenBit, layers_of, length_of, owned
from eigencache.codec.quantization.fp8 import FP8_MAX, from_fp8, to_fp8
from eigencache.codec.quantization.scales import divisor, scale_reaching
from eigencache.errors import CodecError

FIRST_EXACT = 4  # first tokens in 16 bits by default: the first is an attention sink with a small key and value


def middle_of(tokens: int, start: int, sinks: int, window: int) -> tuple[int, int]:
    """Return the tokens between sinks and window as a half-open range.

    Args:
        tokens: Number of tokens of the stretch.
        start: Position of its first token.
        sinks: Number of first positions, counted from position 0, that are sinks.
        window: Number of last tokens of the stretch that belong to the window.
    """
    first = min(tokens, max(0, sinks - start))
    return first, max(first, tokens - window)


@dataclass(frozen=True, eq=False)
class Pieces:
    """Sinks, coded tokens and window of one stretch, in this order; empty pieces are left out."""

    parts: tuple[tuple[str, EncodedStretch], ...]  # "sinks", "coded" or "window", and what is stored of it
    start: int
    tokens: int

    @property
    def nbytes(self) -> int:
        """Bytes of all pieces."""
        return sum(part.nbytes for _, part in self.parts)

    def select(self, rows: Tensor) -> "Pieces":
        """Return the given rows of the batch."""
        return Pieces(tuple((role, part.select(rows)) for role, part in self.parts), self.start, self.tokens)


@dataclass(frozen=True, eq=False)
class WithSinksAndWindow:
    """A codec that leaves the first `sinks` positions and the last `window` tokens of a stretch uncompressed.

    Args:
        codec: Encodes all other tokens.
        dtype: The model's.
        sinks: First positions, counted from position 0.
        window: Last tokens of the stretch.
        sink_format: How sinks are stored; the window always has 16 bits.
    """

    codec: Codec
    dtype: torch.dtype
    sinks: int = 0
    window: int = 0
    sink_format: Literal["16 bit", "fp8"] = "16 bit"

    @property
    def name(self) -> str:
        """Name of the codec."""
        return self.codec.name

    @property
    def nbytes(self) -> int:
        """Bytes that the codec stores once."""
        return self.codec.nbytes

    def encode(self, cached: Cached, start: int) -> Pieces:
        """Encode sinks, coded tokens and window, each in its format. Raises what the codec raises."""
        tokens = length_of(cached)
        first, last = middle_of(tokens, start, self.sinks, self.window)
        parts = []
        for role, a, b in (("sinks", 0, first), ("coded", first, last), ("window", last, tokens)):
            if b > a:
                piece = {i: (keys[:, :, a:b], values[:, :, a:b]) for i, (keys, values) in cached.items()}
                parts.append((role, self._codec(role).encode(piece, start + a)))
        return Pieces(tuple(parts), start, tokens)

    def decode(self, encoded: Pieces) -> dict[int, tuple[Tensor, Tensor]]:
        """Return all tokens in the model's dtype."""
        decoded = [self._codec(role).decode(part) for role, part in encoded.parts]
        return {i: tuple(torch.cat([d[i][s].to(self.dtype) for d in decoded], 2) for s in (0, 1)) for i in decoded[0]}  # type: ignore[misc]

    def _codec(self, role: str) -> Any:
        if role == "coded":
            return self.codec
        return Fp8(self.dtype) if role == "sinks" and self.sink_format == "fp8" else SixteenBit(self.dtype)


@dataclass(frozen=True)
class Fp8:
    """The cache in e4m3, one byte per number, with a float16 scale per layer, head and token. `dtype` is the model's."""

    dtype: torch.dtype
    name: str = "fp8"
    nbytes: int = 0

    def encode(self, cached: Cached, start: int) -> Encoded:
        """Encode both slots of every layer as codes and scales.

        Raises:
            CodecError: The cache holds NaN, infinite values, or values beyond the range of float16 scales.
        """
        tensors = {}
        for layer_idx, both in cached.items():
            for slot, x in enumerate(both):
                largest = x.abs().amax(-1, keepdim=True).float()
                scale = scale_reaching(largest, FP8_MAX)
                if not (scale.isfinite().all() and x.isfinite().all()):
                    raise CodecError(f"layer {layer_idx} holds numbers that do not fit into fp8 with float16 scales")
                tensors[f"{layer_idx}.{slot}.codes"] = owned(to_fp8(x.float() / divisor(scale)))
                tensors[f"{layer_idx}.{slot}.scale"] = owned(scale)
        return Encoded(tensors, start, length_of(cached))

    def decode(self, encoded: Encoded) -> dict[int, tuple[Tensor, Tensor]]:
        """Return both slots in the model's dtype."""
        return {i: tuple(self._slot(encoded, f"{i}.{slot}") for slot in (0, 1)) for i in layers_of(encoded.tensors)}  # type: ignore[misc]

    def _slot(self, encoded: Encoded, name: str) -> Tensor:
        return (from_fp8(encoded.tensors[f"{name}.codes"]) * encoded.tensors[f"{name}.scale"].float()).to(self.dtype)
