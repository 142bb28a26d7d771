"""Keys rounded number by number to fp8 or int8, values in 16 bits: measures what large key biases do to rounding.

`fp8`: e4m3 with one float32 scale per layer and sequence, the largest magnitude at 448. `int8`: symmetric, one scale per
token and head, the largest magnitude at 127. With `means`, the mean of the keys before rotation is rotated to every
position, subtracted before rounding and added back after it (THEORY 8).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from torch import Tensor

from eigencache.codec.base import Cached, Encoded, layers_of, length_of, owned, to_sixteen_bit
from eigencache.codec.mean_before_rotation import rotated_mean
from eigencache.codec.quantization.fp8 import FP8_MAX, from_fp8, to_fp8
from eigencache.codec.quantization.integer import from_int8, to_int8
from eigencache.errors import CodecError
from eigencache.spectral.rope import Rotation

Rounding = Literal["fp8", "int8"]
KINDS: tuple[Rounding, ...] = get_args(Rounding)


@dataclass(frozen=True, eq=False)
class RoundedKeys:
    """Keys in 8 bits, values in 16.

    Args:
        name: Name in tables.
        kind: Number format of the keys.
        dtype: The model's.
        means: Layer → mean of its keys before rotation [heads, dim]; default: none are subtracted.
        rotations: Layer → how its mean is rotated to a position; a layer without one has the same mean at all positions.
    """

    name: str
    kind: Rounding
    dtype: torch.dtype
    means: Mapping[int, Tensor] = field(default_factory=dict)
    rotations: Mapping[int, Rotation] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes of the means."""
        return sum(mean.nbytes for mean in self.means.values())

    def encode(self, cached: Cached, start: int) -> Encoded:
        """Encode keys as one byte per number with scales, and values in 16 bits.

        Raises:
            CodecError: The keys hold NaN or infinite values, or have another shape than the means.
        """
        tensors: dict[str, Tensor] = {}
        for layer_idx, (keys, values) in cached.items():
            x = keys.float() - self._offset(layer_idx, start, keys)
            if not x.isfinite().all():
                raise CodecError(f"{self.name}: keys of layer {layer_idx} hold NaN or infinite values")
            codes, scale = _scaled_fp8(x) if self.kind == "fp8" else to_int8(x, f"keys of layer {layer_idx}")
            tensors |= {f"{layer_idx}.codes": owned(codes), f"{layer_idx}.scale": owned(scale)}
            tensors[f"{layer_idx}.values"] = to_sixteen_bit(values, f"layer {layer_idx}")
        return Encoded(tensors, start, length_of(cached))

    def decode(self, encoded: Encoded) -> dict[int, tuple[Tensor, Tensor]]:
        """Return keys and values in the model's dtype."""
        decoded = {}
        for i in layers_of(encoded.tensors):
            codes, scale, values = (encoded.tensors[f"{i}.{part}"] for part in ("codes", "scale", "values"))
            keys = from_fp8(codes) * scale if self.kind == "fp8" else from_int8(codes, scale)
            keys = keys + self._offset(i, encoded.start, keys)
            decoded[i] = (keys.to(self.dtype), values.to(self.dtype))
        return decoded

    def _offset(self, layer_idx: int, start: int, keys: Tensor) -> Tensor:
        """Return R_n μ for every position of `keys` [batch, heads, seq, dim], or zero."""
        if layer_idx not in self.means:
            return keys.new_zeros((), dtype=torch.float32)
        mean = self.means[layer_idx].to(keys.device, torch.float32)
        if mean.shape != (keys.shape[1], keys.shape[3]):
            raise CodecError(
                f"{self.name}: `means` of layer {layer_idx} have shape {tuple(mean.shape)}, the keys have "
                f"{(keys.shape[1], keys.shape[3])}: use means of this model"
            )
        if layer_idx not in self.rotations:
            return mean[None, :, None]
        positions = torch.arange(start, start + keys.shape[2])[None]
        return rotated_mean(mean, self.rotations[layer_idx], positions)


def _scaled_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return bytes of e4m3 numbers, and the scale [batch, 1, 1, 1] in float32."""
    largest = x.abs().amax((1, 2, 3), keepdim=True)
    scale = torch.where(largest > 0, largest / FP8_MAX, 1)
    return to_fp8(x / scale), scale
