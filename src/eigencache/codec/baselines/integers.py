"""`int8` and `int4`: asymmetric integers per token and head, 8.5 and 4.5 bits per number in groups of 64.

Source: common practice (round to nearest, per token and head), as in the `QuantizedCache` of transformers and in the
KV caches of serving engines; no single paper. Groups of 64 numbers along the head's dimension, or the whole head where it
is narrower; lowest value and step in float16; keys after rotation, as the cache holds them.

Differences: transformers keeps the most recent 128 tokens in 16 bits and uses the quantizer of quanto or HQQ; here all
tokens are quantized, by a plain quantizer. The last group of a head is narrower where the head is no multiple of 64.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from eigencache.codec.baselines.per_slot import PerSlot, Tensors
from eigencache.codec.baselines.registry import BaselineInputs, baseline
from eigencache.codec.quantization.grouped import QuantizedGroups, dequantize, quantize


@dataclass(frozen=True, eq=False)
class Integers(PerSlot):
    """Asymmetric integers for both slots.

    Args:
        bits: Bits per number, without scales.
        dtype: The model's.
        group: Numbers of a head that share lowest value and step.
    """

    bits: Literal[2, 3, 4, 8]
    dtype: torch.dtype
    group: int = 64
    nbytes: int = 0

    @property
    def name(self) -> str:
        """`int8`, `int4`, and so on."""
        return f"int{self.bits}"

    def slot_encoded(self, x: Tensor, layer_idx: int, slot: int, what: str) -> Tensors:
        """Return codes, lowest values and steps."""
        return quantize(x, self.bits, min(self.group, x.shape[-1]), what=what)._asdict()

    def slot_decoded(self, parts: Tensors, layer_idx: int, slot: int, width: int) -> Tensor:
        """Return the numbers of the slot."""
        return dequantize(QuantizedGroups(**parts), self.bits, width, min(self.group, width))


@baseline("int", "integers of 8, 4, 3, 2 bits per token and head")
def integer_codecs(inputs: BaselineInputs) -> dict[str, Integers]:
    """Return the codecs of 8, 4, 3 and 2 bits."""
    return {f"{bits}": Integers(bits, inputs.dtype) for bits in (8, 4, 3, 2)}  # type: ignore[arg-type]
