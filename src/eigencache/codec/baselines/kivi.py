"""`kivi`: keys per channel over 32 tokens, values per token over 32 channels, the last 128 tokens in 16 bits.

Source: Liu et al., KIVI: A Tuning-Free Asymmetric 2bit Quantization for KV Cache, ICML 2024, arXiv 2402.02750,
github.com/jy-yuan/KIVI. Asymmetric, 2 or 4 bits, lowest value and step in 16 bits: 3 and 5 bits per number; keys after
rotation.

Differences: the last `residual` tokens are those of the stretch that is encoded. Keys that do not fill a group of 32
tokens are stored in 16 bits and counted, so a cache should be encoded in stretches of a multiple of 32 tokens (values do
not need full groups, as in the paper). Where a head is no multiple of 32, the last group of its values is narrower. Lowest
value and step are rounded outwards to float16, so that nothing is clipped. For MLA, which the paper does not treat, the
latent counts as keys and the rotary key as values.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from eigencache.codec.base import to_sixteen_bit
from eigencache.codec.baselines.per_slot import PerSlot, Tensors
from eigencache.codec.baselines.registry import BaselineInputs, baseline
from eigencache.codec.quantization.grouped import QuantizedGroups, dequantize, quantize
from eigencache.codec.sinks_and_window import WithSinksAndWindow


@dataclass(frozen=True, eq=False)
class KIVI(PerSlot):
    """The quantized part of KIVI.

    Args:
        bits: Bits per number, without scales.
        dtype: The model's.
        group: Tokens (keys) or channels (values) that share lowest value and step.
    """

    bits: Literal[2, 4]
    dtype: torch.dtype
    group: int = 32
    nbytes: int = 0

    @property
    def name(self) -> str:
        """`kivi 2 bit`, `kivi 4 bit`."""
        return f"kivi {self.bits} bit"

    def slot_encoded(self, x: Tensor, layer_idx: int, slot: int, what: str) -> Tensors:
        """Return groups of channels for values; for keys groups of tokens, and the remaining tokens as `rest`."""
        if slot == 1:
            return quantize(x, self.bits, min(self.group, x.shape[-1]), what=what)._asdict()
        full = x.shape[2] // self.group * self.group
        parts: dict[str, Tensor] = {}
        if full:
            parts |= quantize(x[:, :, :full].mT, self.bits, self.group, what=what)._asdict()
        if full < x.shape[2]:
            parts["rest"] = to_sixteen_bit(x[:, :, full:], what)
        return parts

    def slot_decoded(self, parts: Tensors, layer_idx: int, slot: int, width: int) -> Tensor:
        """Return the slot: values, or keys of full groups followed by the remaining tokens."""
        stretches = [parts["rest"].float()] if "rest" in parts else []
        if "codes" in parts:
            groups = QuantizedGroups(parts["codes"], parts["low"], parts["step"])
            if slot == 1:
                return dequantize(groups, self.bits, width, min(self.group, width))
            stretches.insert(0, dequantize(groups, self.bits, groups.step.shape[-1] * self.group, self.group).mT)
        return torch.cat(stretches, 2)


def kivi(bits: Literal[2, 4], dtype: torch.dtype, *, residual: int = 128) -> WithSinksAndWindow:
    """Return KIVI as published, with the last `residual` tokens in 16 bits; `dtype` is the model's."""
    return WithSinksAndWindow(KIVI(bits, dtype), dtype, window=residual)


@baseline("kivi", "KIVI, last 128 tokens in 16 bits")
def kivi_codecs(inputs: BaselineInputs) -> dict[str, WithSinksAndWindow]:
    """Return the codecs of 4 and 2 bits."""
    return {f"{bits}": kivi(bits, inputs.dtype) for bits in (4, 2)}  # type: ignore[arg-type]


@baseline("kivi-no-window", "KIVI without window")
def kivi_codecs_without_window(inputs: BaselineInputs) -> dict[str, WithSinksAndWindow]:
    """Return the codecs of 4 and 2 bits that quantize all tokens."""
    return {f"{bits}": kivi(bits, inputs.dtype, residual=0) for bits in (4, 2)}  # type: ignore[arg-type]
