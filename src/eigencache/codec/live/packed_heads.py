"""Keys or values of one layer as bit-packed coefficients of static widths and steps: what the live cache holds.

Heads that share a basis are a bundle. Per bundle, y = E (x − μ), u = round(y + c) of b bits, x̂ = μ + Dᵀ (u − c), steps
within E and D. Attention never makes x̂: queries go to D q, and sums of integers to Dᵀ Σ a (u − c) once per step (THEORY 8).
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
    """`encoder`, `decoder` [bundles, most, heads of a bundle · dim] and `mean` [heads, dim], float32.

    `widths` of every bundle; rows beyond its last coefficient are zero. `turning` of keys with large biases.

    `six` of every bundle: so many coefficients have 6 bits, as digits that are coefficients of their own wherever bytes are
    read: the higher 4 bits are the last rows of 4 bits, D times 4, the lower 2 the first rows of 2 bits. None: no such.
    """

    widths: tuple[Widths, ...]
    encoder: Tensor
    decoder: Tensor
    mean: Tensor
    turning: KeyMean | None = None
    six: tuple[int, ...] = ()
    _known: dict[str, Tensor] = field(init=False, default_factory=dict, repr=False)  # by backend
    _moved: dict[torch.device, "PackedHeads"] = field(init=False, default_factory=dict, repr=False)

    @property
    def bits(self) -> int:
        """Bits of a token."""
        return sum(w.bits for w in self.widths)

    def tensors(self) -> Iterable[Tensor]:
        """All that is held."""
        yield from (self.encoder, self.decoder, self.mean)
        yield from self.turning.tensors() if self.turning else ()

    def to(self, device: str | torch.device) -> "PackedHeads":
        """The same where the cache is: itself, or one copy for each other device, which all caches there share."""
        device = torch.empty(0, device=device).device  # with its index
        if self.decoder.device == device:
            return self
        if device not in self._moved:
            with own_modes():
                encoder, decoder, mean = (t.to(device) for t in (self.encoder, self.decoder, self.mean))
                turning = self.turning and self.turning.to(device)
            self._moved[device] = PackedHeads(self.widths, encoder, decoder, mean, turning, self.six)
        return self._moved[device]

    def __deepcopy__(self, memo: dict[int, Any]) -> "PackedHeads":
        """Itself: nothing of it changes, and a copied cache has the same codec."""
        return self

    def require(self, x: Tensor, layer_idx: int) -> None:
        """Raises `CodecError` where x [batch, heads, tokens, dim] has other heads than these."""
        found, own = (x.shape[1], x.shape[3]), tuple(self.mean.shape)
        if found != own:
            raise CodecError(
                f"layer {layer_idx} has {found[0]} heads of {found[1]}, the codec {own[0]} of {own[1]}: "
                "it was fitted on another model"
            )

    def encode(self, x: Tensor, positions: Tensor) -> Tensor:
        """Bytes uint8 [batch, blocks, bytes] of x [batch, heads, 64 · blocks, dim] at positions [batch, tokens].

        Positions follow on within a block. What lies beyond the widest integer becomes that: the steps are chosen for what
        it costs.
        """
        turned = self.turning and self.turning.mean_at(positions[:, ::BLOCK])
        encode = packed_backend(x, x.shape[2]).encode
        return encode(x, self.mean, self.encoder, self.widths, self.six, turned)

    def decode(self, packed: Tensor, positions: Tensor) -> Tensor:
        """x̂ [batch, heads, tokens, dim] float32."""
        u = unpack(packed, self.widths).float()
        x = (u - largest_integers(self.widths).to(u)[:, :, None] / 2).mT @ self.decoder
        means = self.mean[:, None] + (0 if self.turning is None else self.turning.at(positions))
        return self._unbundled(x, len(self.mean)) + means

    @cached_property
    @constant
    def offset(self) -> Tensor:
        """What integers of zero stand for, less the turning [heads, dim]: μ − Dᵀ c."""
        centers = largest_integers(self.widths).to(self.decoder) / 2
        return self.mean - (centers[:, None, None] @ self._decoders(None)).flatten(0, 2)

    def queries(self, q: Tensor, backend: PackedBackend) -> Tensor:
        """D q [batch, bundles, rows of all its heads, most] of queries [batch, heads, rows, dim], for a backend."""
        batch, heads, rows, dim = q.shape
        bundled = q.reshape(batch, len(self.widths), -1, rows, dim) @ self._decoders(backend).mT
        return bundled.view(batch, len(self.widths), heads // len(self.widths) * rows, -1)

    def expanded(self, sums: Tensor, backend: PackedBackend) -> Tensor:
        """Dᵀ s [batch, heads, rows, dim] of a backend's sums [batch, bundles, rows of all its heads, most]."""
        decoders = self._decoders(backend)
        batch, bundles, rows, most = sums.shape
        heads = decoders.shape[1]
        found = sums.reshape(batch, bundles, heads, rows // heads, most) @ decoders
        return found.view(batch, bundles * heads, rows // heads, -1)

    def _decoders(self, backend: PackedBackend | None) -> Tensor:
        """D [bundles, heads of a bundle, most, dim], of planes where a backend reads those."""
        name = "" if backend is None or backend.planes is None else backend.name
        if name not in self._known:
            with own_modes(), torch.no_grad():  # what is kept serves passes of any kind
                planes = backend.planes(self.widths).to(self.decoder.device) if name else None  # type: ignore[union-attr, misc]
                decoder = self.decoder if planes is None else planes.mT @ self.decoder
                self._known[name] = decoder.unflatten(-1, (-1, self.mean.shape[1])).transpose(1, 2)
        return self._known[name]

    def _unbundled(self, x: Tensor, heads: int) -> Tensor:
        """[batch, bundles, tokens, numbers of a bundle] → [batch, heads, tokens, dim]."""
        return x.unflatten(3, (heads // len(self.widths), -1)).transpose(2, 3).flatten(1, 2)
