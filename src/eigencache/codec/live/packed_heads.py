"""Keys or values of one layer as bit-packed coefficients with static bit widths and steps: what the live codec packs.

Heads that share a basis form a bundle. Per bundle, encoding is y = E (x − μ), u = round(y + c), an integer of b bits, and
decoding is x̂ = μ + Dᵀ (u − c); E and D contain the quantization steps. Attention never computes x̂: it projects queries to
D q, and sums of integers to Dᵀ Σ a (u − c), once per decode step (THEORY 8).
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from eigencache.codec.live.rotated_mean import KeyMean
from eigencache.errors import CodecError
from eigencache.kernels.packed.backend import PackedBackend, packed_backend
from eigencache.kernels.packed.format import BLOCK, Widths, largest_integers, unpack
from eigencache.modes import constant, own_modes


@dataclass(frozen=True, eq=False)
class PackedHeads:
    """Encoder and decoder of the keys or the values of one layer.

    A 6-bit coefficient is stored as two digits, a 4-bit one and a 2-bit one, and readers treat each digit as a coefficient
    of its own. The high digits are the last 4-bit rows, with D multiplied by 4; the low digits are the first 2-bit rows.

    Attributes:
        widths: Numbers of 8-, 4- and 2-bit coefficients of every bundle.
        encoder: E [bundles, most, heads per bundle · dim] float32. `most` is the largest number of coefficients of a
            bundle; rows beyond a bundle's last coefficient are zero.
        decoder: D, same shape.
        mean: μ [heads, dim] float32.
        rotated_mean: Mean of keys before rotation that is subtracted too; None for values and for keys without large biases.
        six: Number of 6-bit coefficients of every bundle; empty if there are none.
    """

    widths: tuple[Widths, ...]
    encoder: Tensor
    decoder: Tensor
    mean: Tensor
    rotated_mean: KeyMean | None = None
    six: tuple[int, ...] = ()
    _by_backend: dict[str, Tensor] = field(init=False, default_factory=dict, repr=False)
    _by_device: dict[torch.device, "PackedHeads"] = field(init=False, default_factory=dict, repr=False)

    @property
    def bits(self) -> int:
        """Bits per token, all heads together."""
        return sum(w.bits for w in self.widths)

    def tensors(self) -> Iterable[Tensor]:
        """Yield all stored tensors."""
        yield from (self.encoder, self.decoder, self.mean)
        yield from self.rotated_mean.tensors() if self.rotated_mean else ()

    def to(self, device: str | torch.device) -> "PackedHeads":
        """Return these heads on `device`: themselves, or one copy per device that all caches on it share."""
        device = torch.empty(0, device=device).device  # with its index
        if self.decoder.device == device:
            return self
        if device not in self._by_device:
            with own_modes():
                encoder, decoder, mean = (t.to(device) for t in (self.encoder, self.decoder, self.mean))
                rotated_mean = self.rotated_mean and self.rotated_mean.to(device)
            self._by_device[device] = PackedHeads(self.widths, encoder, decoder, mean, rotated_mean, self.six)
        return self._by_device[device]

    def __deepcopy__(self, memo: dict[int, Any]) -> "PackedHeads":
        """Return the heads themselves: they never change, and copies of a cache share their codec."""
        return self

    def require(self, x: Tensor, layer_idx: int) -> None:
        """Check that x [batch, heads, tokens, dim] has as many heads and numbers per head as these.

        Raises:
            CodecError: The shape differs, so the codec was fitted on another model.
        """
        given, expected = (x.shape[1], x.shape[3]), tuple(self.mean.shape)
        if given != expected:
            raise CodecError(
                f"layer {layer_idx}: the cache has {given[0]} heads of {given[1]} numbers, the codec expects "
                f"{expected[0]} of {expected[1]}. It was fitted on another model: fit one on this model"
            )

    def encode(self, x: Tensor, positions: Tensor) -> Tensor:
        """Pack whole blocks of tokens.

        Coefficients out of range saturate; the steps are fitted with this loss included.

        Args:
            x: Keys or values [batch, heads, 64 · blocks, dim].
            positions: Positions of the tokens [batch, 64 · blocks], consecutive within a block.

        Returns:
            Packed blocks, uint8 [batch, blocks, bytes].
        """
        mean = self.rotated_mean and self.rotated_mean.rotated_to_blocks(positions[:, ::BLOCK])
        encode = packed_backend(x, x.shape[2]).encode
        return encode(x, self.mean, self.encoder, self.widths, self.six, mean)

    def decode(self, packed: Tensor, positions: Tensor) -> Tensor:
        """Unpack blocks.

        Args:
            packed: Packed blocks, uint8 [batch, blocks, bytes].
            positions: Positions of their tokens [batch, 64 · blocks].

        Returns:
            x̂ [batch, heads, 64 · blocks, dim] float32.
        """
        u = unpack(packed, self.widths).float()
        x = (u - largest_integers(self.widths).to(u)[:, :, None] / 2).mT @ self.decoder
        means = self.mean[:, None] + (0 if self.rotated_mean is None else self.rotated_mean.rotated_to(positions))
        return self._unbundled(x, len(self.mean)) + means

    @cached_property
    @constant
    def offset(self) -> Tensor:
        """μ − Dᵀ c [heads, dim], the vector that integers of zero decode to, without the rotated mean."""
        centers = largest_integers(self.widths).to(self.decoder) / 2
        return self.mean - (centers[:, None, None] @ self._decoders(None)).flatten(0, 2)

    def queries(self, q: Tensor, backend: PackedBackend) -> Tensor:
        """Project queries to coefficients.

        Args:
            q: Queries [batch, heads, rows, dim].
            backend: Backend that will read the packed blocks.

        Returns:
            D q [batch, bundles, rows of all heads of a bundle, most].
        """
        batch, heads, rows, dim = q.shape
        bundled = q.reshape(batch, len(self.widths), -1, rows, dim) @ self._decoders(backend).mT
        return bundled.view(batch, len(self.widths), heads // len(self.widths) * rows, -1)

    def expanded(self, sums: Tensor, backend: PackedBackend) -> Tensor:
        """Expand weighted sums of integers to vectors.

        Args:
            sums: Sums that `backend` returned [batch, bundles, rows of all heads of a bundle, most].
            backend: Backend that read the packed blocks.

        Returns:
            Dᵀ s [batch, heads, rows, dim].
        """
        decoders = self._decoders(backend)
        batch, bundles, rows, most = sums.shape
        heads = decoders.shape[1]
        vectors = sums.reshape(batch, bundles, heads, rows // heads, most) @ decoders
        return vectors.view(batch, bundles * heads, rows // heads, -1)

    def _decoders(self, backend: PackedBackend | None) -> Tensor:
        """Return D [bundles, heads per bundle, most, dim], for bit planes if the backend reads those."""
        name = "" if backend is None or backend.planes is None else backend.name
        if name not in self._by_backend:
            with own_modes(), torch.no_grad():  # the stored tensor serves calls in any mode
                planes = backend.planes(self.widths).to(self.decoder.device) if name else None  # type: ignore[union-attr, misc]
                decoder = self.decoder if planes is None else planes.mT @ self.decoder
                self._by_backend[name] = decoder.unflatten(-1, (-1, self.mean.shape[1])).transpose(1, 2)
        return self._by_backend[name]

    def _unbundled(self, x: Tensor, heads: int) -> Tensor:
        """Reshape [batch, bundles, tokens, numbers of a bundle] to [batch, heads, tokens, dim]."""
        return x.unflatten(3, (heads // len(self.widths), -1)).transpose(2, 3).flatten(1, 2)
