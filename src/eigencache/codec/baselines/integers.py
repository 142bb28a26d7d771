"""`int8` and `int4`: asymmetric integers per token and head, 8.5 and 4.5 bits per number in groups of 64.

Source: common practice (round to nearest, per token and head), as in the `QuantizedCache` of transformers and in the
KV caches of serving engines; no single paper. Groups of 64 numbers along the head's dimension, or the whole head where it
is narrower; lowest value and step in float16; the cache as it is, keys after rotation.

Where this differs: transformers keeps the most recent 128 tokens in 16 bits and takes quanto's or HQQ's quantizer; here
no token is kept apart, and the quantizer is plain. Where a head is no multiple of 64, its last group is narrower.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from eigencache.codec.baselines.asymmetric import Groups, dequantized, quantized
from eigencache.codec.baselines.per_slot import PerSlot, Tensors


@dataclass(frozen=True, eq=False)
class Integers(PerSlot):
    """`bits`-bit integers for both slots; `dtype`: the model's."""

    bits: Literal[2, 3, 4, 8]
    dtype: torch.dtype
    group: int = 64
    nbytes: int = 0

    @property
    def name(self) -> str:
        """`int8`, `int4`, …"""
        return f"int{self.bits}"

    def slot_encoded(self, x: Tensor, layer_idx: int, slot: int, what: str) -> Tensors:
        """Codes, lowest values and steps."""
        return quantized(x, self.bits, min(self.group, x.shape[-1]), what)._asdict()

    def slot_decoded(self, parts: Tensors, layer_idx: int, slot: int, width: int) -> Tensor:
        """Numbers again."""
        return dequantized(Groups(**parts), self.bits, width, min(self.group, width))
