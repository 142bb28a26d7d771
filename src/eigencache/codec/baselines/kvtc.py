"""`kvtc`: PCA of all layers and heads, formats chosen by dynamic programming at a bit budget, DEFLATE over the bytes.

Source: Staniszewski and Łańcucki (NVIDIA), KV Cache Transform Coding for Compact Storage in LLM Inference, ICLR 2026, arXiv
2511.01815; the authors' code was not available. Keys and values separately, keys before rotation, all layers and heads
concatenated; centered PCA without a metric; runs of 1, 16, 64, 256 or 1024 components are dropped or get int2, int4 or
fp8 with a 16-bit shift and a 16-bit scale per token; the least error of reconstruction (Frobenius) at a budget of bits per
token, the same share for keys and values, counted before DEFLATE; the first 4 tokens in fp8, the last 128 in 16 bits.

Differences, and choices where the paper is not explicit:
* zlib's DEFLATE (level 9, no header) over the whole stretch of one sequence; the paper has nvCOMP's over blocks on a GPU.
* An exact eigendecomposition in float64 (of the Gram matrix where there are fewer vectors than dimensions) instead of a
  randomized one. Mean and basis are stored in float32, for the components in use only.
* The error of a group is measured on at most 256 of the calibration vectors, or of held-out vectors.
* fp8 has shift and scale like the integers; the shift is the middle of the range.
* The bytes of a group are its shifts and scales, low bytes before high bytes, and its codes component by component, which
  makes 1 to 4 % fewer bytes than plain order on the bundled models.
* Summaries of the paper say that the first 4 tokens are not compressed at all: use `sink_format="16 bit"` for that.
"""

import zlib
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from eigencache.codec.base import Cached, EncodedBytes, length_of
from eigencache.codec.baselines.allocation import ComponentGroup
from eigencache.codec.baselines.kvtc_formats import BITS, from_codes, shift_and_scale, to_codes
from eigencache.codec.layout import Layout, Slots, by_layer
from eigencache.codec.quantization.bitpack import pack, unpack
from eigencache.codec.quantization.grouped import require_finite
from eigencache.errors import CodecError


@dataclass(frozen=True, eq=False)
class TransformedKind:
    """The transform of keys or values of all layers: `mean` [width], `basis` [width, used components] and their groups."""

    layout: Layout
    mean: Tensor
    basis: Tensor
    groups: tuple[ComponentGroup, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of mean and basis."""
        return self.mean.nbytes + self.basis.nbytes

    def to_bytes(self, cached: Cached, start: int) -> Tensor:
        """Return uint8 [batch, bytes]: shifts, scales and codes of every group."""
        vectors = self.layout.vectors(cached, start, self.mean)
        y = (vectors - self.mean.to(vectors)) @ self.basis.to(vectors)
        parts = [torch.empty(len(y), 0, dtype=torch.uint8, device=y.device)]
        for first, size, kind in self.groups:
            x = y[..., first : first + size]
            shift, scale = shift_and_scale(x, kind)
            codes = to_codes(x, kind, shift, scale)
            parts += [_planes(shift), _planes(scale), pack(codes.mT.flatten(1), BITS[kind])]
        return torch.cat(parts, 1)

    def from_bytes(self, packed: Tensor, tokens: int, start: int) -> Slots:
        """Return the slots, keys rotated.

        Args:
            packed: What `to_bytes` returned.
            tokens: Number of tokens.
            start: Position of the first token.
        """
        sizes = [n for group in self.groups for n in (2 * tokens, 2 * tokens, code_bytes(group, tokens))]
        parts = iter(packed.split(sizes, 1))
        coefficients = [self.mean.new_zeros(len(packed), tokens, 0)]
        for _, size, kind in self.groups:
            shift, scale = _from_planes(next(parts)), _from_planes(next(parts))
            codes = unpack(next(parts), BITS[kind], tokens * size).unflatten(1, (size, tokens)).mT
            coefficients.append(from_codes(codes, kind, shift, scale))
        return self.layout.slots(torch.cat(coefficients, -1) @ self.basis.mT + self.mean, start)

    def packed_nbytes(self, tokens: int) -> int:
        """Return the bytes of one sequence before DEFLATE."""
        return sum(4 * tokens + code_bytes(group, tokens) for group in self.groups)


@dataclass(frozen=True, eq=False)
class KVTC:
    """The codec without sinks and window. `kinds` are the transforms of keys and of values, `dtype` is the model's."""

    kinds: tuple[TransformedKind, ...]
    dtype: torch.dtype
    name: str

    @property
    def nbytes(self) -> int:
        """Bytes of all means and bases."""
        return sum(kind.nbytes for kind in self.kinds)

    def encode(self, cached: Cached, start: int) -> EncodedBytes:
        """Encode a stretch as one DEFLATE stream per row.

        Raises:
            CodecError: The cache holds NaN or infinite values, or other layers or shapes than the codec was fitted on.
        """
        for layer_idx, both in cached.items():
            for x in both:
                require_finite(x, f"{self.name}: layer {layer_idx}")
        known = {(part.layer_idx, part.slot) for kind in self.kinds for part in kind.layout.parts}
        for layer_idx in cached:
            if not {(layer_idx, 0), (layer_idx, 1)} <= known:
                raise CodecError(f"{self.name} has no layer {layer_idx}: it was fitted on another model")
        packed = torch.cat([kind.to_bytes(cached, start) for kind in self.kinds], 1).cpu().numpy()
        return EncodedBytes(tuple(_deflated(row.tobytes()) for row in packed), start, length_of(cached))

    def decode(self, encoded: EncodedBytes) -> dict[int, tuple[Tensor, Tensor]]:
        """Return the cache's tensors in the model's dtype, on the device of the bases."""
        sizes = [kind.packed_nbytes(encoded.tokens) for kind in self.kinds]
        rows = [zlib.decompress(row, -zlib.MAX_WBITS) for row in encoded.rows]
        if any(len(row) != sum(sizes) for row in rows):
            raise CodecError(f"{self.name}: expected {sum(sizes)} bytes, found {len(rows[0])}: another codec encoded them")
        packed = torch.from_numpy(np.stack([np.frombuffer(row, np.uint8) for row in rows])).to(self.kinds[0].mean.device)
        slots: Slots = {}
        for kind, part in zip(self.kinds, packed.split(sizes, 1), strict=True):
            slots |= kind.from_bytes(part, encoded.tokens, encoded.start)
        return by_layer(slots, self.dtype)


def code_bytes(group: ComponentGroup, tokens: int) -> int:
    """Return the bytes of the codes of a group."""
    return -(-tokens * group.size * BITS[group.kind] // 8)


def _planes(x: Tensor) -> Tensor:
    """Return the low bytes of float16 numbers [batch, tokens], then the high bytes: [batch, 2·tokens]."""
    return x.contiguous().view(torch.uint8).unflatten(1, (-1, 2)).mT.flatten(1)


def _from_planes(planes: Tensor) -> Tensor:
    """Return the float16 numbers of `_planes`."""
    return planes.unflatten(1, (2, -1)).mT.flatten(1).clone().view(torch.float16)


def _deflated(data: bytes) -> bytes:
    stream = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    return stream.compress(data) + stream.flush()
