"""Keys or values of one layer as bit-packed coefficients of static widths and steps: what the live cache holds.

Heads that share a basis are a bundle. Per bundle, y = E (x − μ), u = round(y + c) of b bits, x̂ = μ + Dᵀ (u − c), steps
within E and D. Attention never makes x̂: queries go to D q, and sums of integers to Dᵀ Σ a (u − c) once per step (THEORY 8).
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from eigencache.codec.turning import Turning
from eigencache.errors import CodecError
from eigencache.kernels.packed import PackedBackend
from eigencache.kernels.reference import Widths, largest_integers, pack, unpack


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
    turning: Turning | None = None
    six: tuple[int, ...] = ()
    _known: dict[str, Tensor] = field(init=False, default_factory=dict, repr=False)  # by backend

    @property
    def bits(self) -> int:
        """Bits of a token."""
        return sum(w.bits for w in self.widths)

    def tensors(self) -> Iterable[Tensor]:
        """All that is held."""
        yield from (self.encoder, self.decoder, self.mean)
        yield from self.turning.tensors() if self.turning else ()

    def to(self, device: str | torch.device) -> "PackedHeads":
        """The same where the cache is."""
        encoder, decoder, mean = (t.to(device) for t in (self.encoder, self.decoder, self.mean))
        return PackedHeads(self.widths, encoder, decoder, mean, self.turning and self.turning.to(device), self.six)

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

        What lies beyond the widest integer becomes that: the steps are chosen for what it costs.
        """
        y = self.encoder @ self._bundled(x.float() - self._taken_out(positions)).mT
        most, shifts, masks = (t.to(y.device)[:, :, None] for t in self._digits)
        codes = (y + most / 2).round_().clamp_(min=torch.zeros_like(most), max=most).to(torch.uint8)
        return pack((codes >> shifts) & masks if any(self.six) else codes, self.widths)

    def decode(self, packed: Tensor, positions: Tensor) -> Tensor:
        """x̂ [batch, heads, tokens, dim] float32."""
        u = unpack(packed, self.widths).float()
        x = (u - largest_integers(self.widths).to(u)[:, :, None] / 2).mT @ self.decoder
        return self._unbundled(x, len(self.mean)) + self._taken_out(positions)

    @cached_property
    def offset(self) -> Tensor:
        """What integers of zero stand for, less the turning [heads, dim]: μ − Dᵀ c."""
        with torch.inference_mode(False), torch.no_grad():
            centres = largest_integers(self.widths).to(self.decoder) / 2
            return self.mean - torch.einsum("gm,gmsd->gsd", centres, self._decoders(None)).flatten(0, 1)

    @cached_property
    def _digits(self) -> tuple[Tensor, Tensor, Tensor]:
        """Of every row [bundles, most]: the largest integer float32; the shift and mask uint8 that make a digit of it."""
        largest = largest_integers(self.widths)
        most, shifts = largest.clone(), torch.zeros_like(largest, dtype=torch.uint8)
        for i, (w, count) in enumerate(zip(self.widths, self.six or (0,) * len(self.widths), strict=True)):
            high = slice(w.eight + w.four - count, w.eight + w.four)
            most[i, high.start : high.stop + count] = 63
            shifts[i, high] = 2
        return most, shifts, largest.to(torch.uint8)

    def queries(self, q: Tensor, backend: PackedBackend) -> Tensor:
        """D q [batch, bundles, rows of all its heads, most] of queries [batch, heads, rows, dim], for a backend."""
        rows = q.unflatten(1, (len(self.widths), -1))
        return torch.einsum("bgsrd,gmsd->bgsrm", rows, self._decoders(backend)).flatten(2, 3)

    def expanded(self, sums: Tensor, backend: PackedBackend) -> Tensor:
        """Dᵀ s [batch, heads, rows, dim] of a backend's sums [batch, bundles, rows of all its heads, most]."""
        decoders = self._decoders(backend)
        rows = sums.unflatten(2, (decoders.shape[2], -1))
        return torch.einsum("bgsrm,gmsd->bgsrd", rows, decoders).flatten(1, 2)

    def _decoders(self, backend: PackedBackend | None) -> Tensor:
        """D [bundles, most, heads of a bundle, dim], of planes where a backend reads those."""
        name = "" if backend is None or backend.planes is None else backend.name
        if name not in self._known:
            with torch.inference_mode(False), torch.no_grad():  # what is kept serves passes of any kind
                planes = backend.planes(self.widths).to(self.decoder.device) if name else None  # type: ignore[union-attr, misc]
                decoder = self.decoder if planes is None else planes.mT @ self.decoder
                self._known[name] = decoder.unflatten(-1, (-1, self.mean.shape[1]))
        return self._known[name]

    def _bundled(self, x: Tensor) -> Tensor:
        """[batch, heads, tokens, dim] → [batch, bundles, tokens, numbers of a bundle]."""
        return x.unflatten(1, (len(self.widths), -1)).transpose(2, 3).flatten(3)

    def _unbundled(self, x: Tensor, heads: int) -> Tensor:
        """And back."""
        return x.unflatten(3, (heads // len(self.widths), -1)).transpose(2, 3).flatten(1, 2)

    def _taken_out(self, positions: Tensor) -> Tensor:
        return self.mean[:, None] + (0 if self.turning is None else self.turning.at(positions))
