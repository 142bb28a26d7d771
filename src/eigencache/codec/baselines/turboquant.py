"""`turboquant`: a vector's norm, and its direction in a random basis, coordinate by coordinate from a Gaussian codebook.

Source: Zandieh et al., TurboQuant: Online Vector Quantization with Near-optimal Distortion Rate, ICLR 2026, arXiv
2504.19874, and what vLLM ships of it (vllm/model_executor/layers/quantization/turboquant). The norm in float16; a random
rotation makes every coordinate of a unit vector nearly Gaussian with variance 1/d; 2, 3 or 4 bits by the Lloyd–Max
codebook: b + 16/d bits per number; the first and last two layers in 16 bits, of no more than half of the layers each, as
in vLLM. Keys after rotation.

Where this differs from the paper: no second stage (one bit of the residual, QJL), which vLLM leaves out too; no outlier
channels with more bits. Where this differs from vLLM: the basis is a seeded random orthogonal one and not a Hadamard
matrix, so that any width will do; with `values="codebook"` values go through the codebook as in the paper, where vLLM takes
asymmetric integers of one group per head (`values="uniform"`); directions keep the length that the codebook gives them,
where vLLM's presets `_nc` bring them back to length 1 (`renormalized`). vLLM exempts hybrid models from 16-bit layers and
pads a head to an even number of bytes: neither is done here. For MLA, which the paper does not treat, latent and rotary
key count as keys and values.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from eigencache.codec.baselines.lloyd_max import borders, gaussian_codebook
from eigencache.codec.baselines.per_slot import PerSlot, Tensors
from eigencache.codec.quantization.bitpack import pack, unpack
from eigencache.codec.quantization.grouped import QuantizedGroups, dequantize, quantize
from eigencache.errors import CodecError

Bits = Literal[2, 3, 4]


@dataclass(frozen=True, eq=False)
class TurboQuant(PerSlot):
    """`bases`: width → orthogonal matrix [width, width]; `sixteen_bit`: layers that are kept as they are."""

    bits: Bits
    value_bits: Bits
    dtype: torch.dtype  # the model's
    bases: Mapping[int, Tensor]
    sixteen_bit: frozenset[int]
    values: Literal["codebook", "uniform"]
    renormalized: bool

    @property
    def name(self) -> str:
        """`turboquant 3 bit`, `turboquant 4/3 bit`."""
        return f"turboquant {self.bits}{'' if self.bits == self.value_bits else f'/{self.value_bits}'} bit"

    @property
    def nbytes(self) -> int:
        """Bases and codebooks; a basis could be drawn again from its seed, and is counted all the same."""
        codebooks = {self.bits} | ({self.value_bits} if self.values == "codebook" else set())
        return sum(basis.nbytes for basis in self.bases.values()) + sum(gaussian_codebook(b).nbytes for b in codebooks)

    def is_raw(self, layer_idx: int, slot: int) -> bool:
        """Whether the layer is one of the first and last ones."""
        return layer_idx in self.sixteen_bit

    def slot_encoded(self, x: Tensor, layer_idx: int, slot: int, what: str) -> Tensors:
        """Codes and norms; for values as uniform integers their codes, lowest values and steps."""
        bits = self.value_bits if slot else self.bits
        if slot and self.values == "uniform":
            return quantize(x, bits, x.shape[-1], what=what)._asdict()
        x = x.float()
        norm = x.norm(dim=-1, keepdim=True)
        small = norm.half()
        if not small.isfinite().all():
            raise CodecError(f"{what}: a norm of {float(norm.max()):.3g} does not fit into float16")
        unit = x / torch.where(norm > 0, norm, 1)
        coordinates = (unit @ self._basis(x)) * x.shape[-1] ** 0.5
        codes = torch.bucketize(coordinates, borders(gaussian_codebook(bits)).to(x.device))
        return {"codes": pack(codes.to(torch.uint8), bits), "norm": small[..., 0]}

    def slot_decoded(self, parts: Tensors, layer_idx: int, slot: int, width: int) -> Tensor:
        """Norm times direction."""
        bits = self.value_bits if slot else self.bits
        if slot and self.values == "uniform":
            return dequantize(QuantizedGroups(**parts), bits, width, width)
        numbers = gaussian_codebook(bits).to(parts["codes"].device)
        direction = numbers[unpack(parts["codes"], bits, width).long()] / width**0.5
        if self.renormalized:
            direction = direction / direction.norm(dim=-1, keepdim=True)
        return (direction @ self._basis(direction).mT) * parts["norm"].float()[..., None]

    def _basis(self, x: Tensor) -> Tensor:
        if x.shape[-1] not in self.bases:
            raise CodecError(f"{self.name} has no basis of width {x.shape[-1]}: it was made for another model")
        return self.bases[x.shape[-1]].to(x.device)


def turboquant(
    widths: Mapping[int, tuple[int, int]],
    bits: Bits,
    dtype: torch.dtype,
    *,
    value_bits: Bits | None = None,
    boundary_layers: int = 2,
    values: Literal["codebook", "uniform"] = "codebook",
    renormalized: bool = False,
    seed: int = 0,
) -> TurboQuant:
    """TurboQuant for a model whose cached layers have vectors of these `widths`: layer → (slot 0, slot 1).

    `values="uniform"` with `renormalized=True` is what vLLM's presets `turboquant_4bit_nc` and `turboquant_3bit_nc` do.
    """
    layers = sorted(widths)
    apart = min(boundary_layers, len(layers) // 2)
    bases = {width: random_orthogonal(width, seed) for width in sorted({w for both in widths.values() for w in both})}
    kept = frozenset(layers[:apart] + layers[len(layers) - apart :])
    return TurboQuant(bits, value_bits or bits, dtype, bases, kept, values, renormalized)


def random_orthogonal(width: int, seed: int) -> Tensor:
    """An orthogonal matrix, all alike probable (QR of a Gaussian matrix, signs fixed), float32."""
    noise = torch.randn(width, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    q, r = torch.linalg.qr(noise)
    return (q * r.diagonal().sign()).float()
