"""`turboquant`: norm of a vector, and its direction in a random basis, every coordinate quantized by a Gaussian codebook.

Source: Zandieh et al., TurboQuant: Online Vector Quantization with Near-optimal Distortion Rate, ICLR 2026, arXiv
2504.19874, and what vLLM ships of it (vllm/model_executor/layers/quantization/turboquant). The norm in float16; a random
rotation makes every coordinate of a unit vector nearly Gaussian with variance 1/d; 2, 3 or 4 bits by the Lloyd–Max
codebook: b + 16/d bits per number; the first and last two layers in 16 bits, but never more than half of the layers each,
as in vLLM. Keys after rotation.

Differences from the paper: no second stage (one bit of the residual, QJL), which vLLM leaves out too; no outlier
channels with more bits. Differences from vLLM: the basis is a seeded random orthogonal one and not a Hadamard
matrix, so that any width works; with `values="codebook"` values go through the codebook as in the paper, where vLLM uses
asymmetric integers of one group per head (`values="uniform"`); directions keep the length that the codebook gives them,
where vLLM's presets `_nc` rescale them to length 1 (`renormalized`). vLLM exempts hybrid models from 16-bit layers and
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
from eigencache.codec.baselines.registry import BaselineInputs, baseline
from eigencache.codec.quantization.bitpack import pack, unpack
from eigencache.codec.quantization.grouped import QuantizedGroups, dequantize, quantize
from eigencache.errors import CodecError

Bits = Literal[2, 3, 4]


@dataclass(frozen=True, eq=False)
class TurboQuant(PerSlot):
    """TurboQuant for one model; `turboquant` makes it.

    Args:
        bits: Bits per number of slot 0, without norms.
        value_bits: Bits per number of slot 1.
        dtype: The model's.
        bases: Width → orthogonal matrix [width, width].
        sixteen_bit: Layers that are stored in 16 bits.
        values: Whether slot 1 goes through the codebook or is quantized as uniform integers.
        renormalized: Whether decoded directions are rescaled to length 1.
    """

    bits: Bits
    value_bits: Bits
    dtype: torch.dtype
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
        """Bytes of bases and codebooks; bases count, although they could be drawn again from their seed."""
        codebooks = {self.bits} | ({self.value_bits} if self.values == "codebook" else set())
        return sum(basis.nbytes for basis in self.bases.values()) + sum(gaussian_codebook(b).nbytes for b in codebooks)

    def is_raw(self, layer_idx: int, slot: int) -> bool:
        """Return whether the layer is one of the first and last ones."""
        return layer_idx in self.sixteen_bit

    def slot_encoded(self, x: Tensor, layer_idx: int, slot: int, what: str) -> Tensors:
        """Return codes and norms, or codes, lowest values and steps of uniform integers."""
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
        """Return norm times direction, or the uniform integers."""
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
    """Return TurboQuant for a model.

    `values="uniform"` with `renormalized=True` is what vLLM's presets `turboquant_4bit_nc` and `turboquant_3bit_nc` do.

    Args:
        widths: Layer → width of a head in both slots.
        bits: Bits per number of slot 0, without norms.
        dtype: The model's.
        value_bits: Bits per number of slot 1; default: `bits`.
        boundary_layers: First and last layers that stay in 16 bits, at most half of the layers each.
        values: How slot 1 is quantized.
        renormalized: Whether decoded directions are rescaled to length 1.
        seed: Seed of the random bases.
    """
    layers = sorted(widths)
    boundary = min(boundary_layers, len(layers) // 2)
    bases = {width: random_orthogonal(width, seed) for width in sorted({w for both in widths.values() for w in both})}
    kept = frozenset(layers[:boundary] + layers[len(layers) - boundary :])
    return TurboQuant(bits, value_bits or bits, dtype, bases, kept, values, renormalized)


def random_orthogonal(width: int, seed: int) -> Tensor:
    """Return a Haar-distributed orthogonal matrix in float32 (QR of a Gaussian matrix, signs fixed)."""
    noise = torch.randn(width, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    q, r = torch.linalg.qr(noise)
    return (q * r.diagonal().sign()).float()


@baseline("turboquant", "TurboQuant, first and last two layers in 16 bits")
def turboquant_codecs(inputs: BaselineInputs) -> dict[str, TurboQuant]:
    """Return the codecs of 4, 3 and 2 bits."""
    return {f"{bits}": turboquant(inputs.widths, bits, inputs.dtype) for bits in (4, 3, 2)}  # type: ignore[arg-type]


@baseline("turboquant-all", "TurboQuant on all layers")
def turboquant_codecs_of_all_layers(inputs: BaselineInputs) -> dict[str, TurboQuant]:
    """Return the codecs of 4, 3 and 2 bits that quantize all layers."""
    made = {bits: turboquant(inputs.widths, bits, inputs.dtype, boundary_layers=0) for bits in (4, 3, 2)}  # type: ignore[arg-type]
    return {f"{bits}": codec for bits, codec in made.items()}
