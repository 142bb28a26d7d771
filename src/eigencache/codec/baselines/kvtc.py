"""`kvtc`: PCA of all layers and heads, formats chosen by dynamic programming at a bit budget, DEFLATE over the bytes.

Source: Staniszewski and Łańcucki (NVIDIA), KV Cache Transform Coding for Compact Storage in LLM Inference, ICLR 2026, arXiv
2511.01815; no code of the authors' was at hand. Keys and values apart, keys before rotation, all layers and heads side by
side; centered PCA that knows nothing of queries; runs of 1, 16, 64, 256 or 1024 components are dropped or get int2, int4 or
fp8 with a 16-bit shift and a 16-bit scale per token; the least error of reconstruction (Frobenius) at a budget of bits per
token, the same share for keys and values, counted before DEFLATE; the first 4 tokens in fp8, the last 128 in 16 bits.

Where this differs, or where the paper could not be read to the letter: zlib's DEFLATE (level 9, no header) over the whole
stretch of one sequence, where the paper has nvCOMP's over blocks on a GPU; an exact eigendecomposition in float64 (of the
Gram matrix where there are fewer vectors than dimensions) and no randomized one; the error of a group is measured on at
most 256 of the calibration vectors, or of others where those are given; fp8 has shift and scale like the integers, the
shift in the middle of the range; the bytes of a group are its shifts and scales, low and high bytes apart, and its codes
component by component, which makes 1 to 4 % fewer bytes than plain order does on the bundled models. Accounts of
the paper say that the first 4 tokens are not compressed at all: `sink_format="16 bit"`. Mean and basis are held in
float32, for the components in use only.
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
    """Keys or values of all layers: `mean` [width], `basis` [width, used components] and the groups of those."""

    layout: Layout
    mean: Tensor
    basis: Tensor
    groups: tuple[ComponentGroup, ...]

    @property
    def nbytes(self) -> int:
        """Of mean and basis."""
        return self.mean.nbytes + self.basis.nbytes

    def to_bytes(self, cached: Cached, start: int) -> Tensor:
        """uint8 [batch, bytes]: of every group shifts, scales and codes, tokens side by side."""
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
        """The slots again, keys rotated."""
        sizes = [n for group in self.groups for n in (2 * tokens, 2 * tokens, code_bytes(group, tokens))]
        parts = iter(packed.split(sizes, 1))
        coefficients = [self.mean.new_zeros(len(packed), tokens, 0)]
        for _, size, kind in self.groups:
            shift, scale = _from_planes(next(parts)), _from_planes(next(parts))
            codes = unpack(next(parts), BITS[kind], tokens * size).unflatten(1, (size, tokens)).mT
            coefficients.append(from_codes(codes, kind, shift, scale))
        return self.layout.slots(torch.cat(coefficients, -1) @ self.basis.mT + self.mean, start)

    def packed_nbytes(self, tokens: int) -> int:
        """Bytes of one sequence before DEFLATE."""
        return sum(4 * tokens + code_bytes(group, tokens) for group in self.groups)


@dataclass(frozen=True, eq=False)
class KVTC:
    """The codec proper, without tokens kept apart. `dtype`: the model's."""

    kinds: tuple[TransformedKind, ...]
    dtype: torch.dtype
    name: str

    @property
    def nbytes(self) -> int:
        """Bytes of all means and bases."""
        return sum(kind.nbytes for kind in self.kinds)

    def encode(self, cached: Cached, start: int) -> EncodedBytes:
        """One DEFLATE stream per row. Raises `CodecError` for NaN and for a cache of other layers or shapes."""
        for layer_idx, both in cached.items():
            for x in both:
                require_finite(x, f"{self.name}: layer {layer_idx}")
        known = {(part.layer_idx, part.slot) for kind in self.kinds for part in kind.layout.parts}
        for layer_idx in cached:
            if not {(layer_idx, 0), (layer_idx, 1)} <= known:
                raise CodecError(f"{self.name} knows no layer {layer_idx}: it was fitted on another model")
        packed = torch.cat([kind.to_bytes(cached, start) for kind in self.kinds], 1).cpu().numpy()
        return EncodedBytes(tuple(_deflated(row.tobytes()) for row in packed), start, length_of(cached))

    def decode(self, encoded: EncodedBytes) -> dict[int, tuple[Tensor, Tensor]]:
        """The cache's tensors in the model's dtype, where the bases are."""
        sizes = [kind.packed_nbytes(encoded.tokens) for kind in self.kinds]
        rows = [zlib.decompress(row, -zlib.MAX_WBITS) for row in encoded.rows]
        if any(len(row) != sum(sizes) for row in rows):
            raise CodecError(f"{self.name}: {len(rows[0])} bytes where {sum(sizes)} belong: this is another codec's stretch")
        packed = torch.from_numpy(np.stack([np.frombuffer(row, np.uint8) for row in rows])).to(self.kinds[0].mean.device)
        slots: Slots = {}
        for kind, part in zip(self.kinds, packed.split(sizes, 1), strict=True):
            slots |= kind.from_bytes(part, encoded.tokens, encoded.start)
        return by_layer(slots, self.dtype)


def code_bytes(group: ComponentGroup, tokens: int) -> int:
    """Bytes of a group's codes."""
    return -(-tokens * group.size * BITS[group.kind] // 8)


def _planes(x: Tensor) -> Tensor:
    """Low bytes of all float16 numbers [batch, tokens], then high bytes: [batch, 2·tokens]."""
    return x.contiguous().view(torch.uint8).unflatten(1, (-1, 2)).mT.flatten(1)


def _from_planes(planes: Tensor) -> Tensor:
    """The float16 numbers again."""
    return planes.unflatten(1, (2, -1)).mT.flatten(1).clone().view(torch.float16)


def _deflated(data: bytes) -> bytes:
    stream = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    return stream.compress(data) + stream.flush()
