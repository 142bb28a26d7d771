"""Keys rounded number by number, fp8 or int8, really stored so; values in 16 bits: what a bias of keys does to them.

`fp8`: e4m3 with one scale per layer and sequence, the largest magnitude at 448. `int8`: symmetric, one scale per token
and head, the largest magnitude at 127. With `means`, a mean of the keys before rotation is rotated to every position,
taken out before rounding and put back after it (THEORY 8).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from torch import Tensor

from eigencache.codec.base import Cached, Encoded, length_of, owned, to_sixteen_bit
from eigencache.codec.mean_before_rotation import rotated_mean
from eigencache.codec.quantization.grouped import scale_reaching
from eigencache.errors import CodecError
from eigencache.spectral.rope import Rotation

Rounding = Literal["fp8", "int8"]
KINDS: tuple[Rounding, ...] = get_args(Rounding)
_FP8_MAX, _INT8_MAX = 448.0, 127


@dataclass(frozen=True, eq=False)
class RoundedKeys:
    """Keys in 8 bits, values in 16. `means`: layer → mean of its keys before rotation [heads, dim]; `dtype`: the model's.

    `rotations`: of the layers whose means have to be rotated to a position; without one a mean is the same everywhere.
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
        """One byte per number of a key, the scales, and values in 16 bits. Raises `CodecError` for NaN."""
        tensors: dict[str, Tensor] = {}
        for layer_idx, (keys, values) in cached.items():
            x = keys.float() - self._offset(layer_idx, start, keys)
            if not x.isfinite().all():
                raise CodecError(f"{self.name}: keys of layer {layer_idx} hold NaN or infinite values")
            codes, scale = _to_fp8(x) if self.kind == "fp8" else _to_int8(x)
            tensors |= {f"{layer_idx}.codes": owned(codes), f"{layer_idx}.scale": owned(scale)}
            tensors[f"{layer_idx}.values"] = to_sixteen_bit(values, f"layer {layer_idx}")
        return Encoded(tensors, start, length_of(cached))

    def decode(self, encoded: Encoded) -> dict[int, tuple[Tensor, Tensor]]:
        """Keys and values in the model's dtype."""
        layers = dict.fromkeys(int(name.split(".")[0]) for name in encoded.tensors)
        decoded = {}
        for i in layers:
            codes, scale, values = (encoded.tensors[f"{i}.{part}"] for part in ("codes", "scale", "values"))
            numbers = codes.view(torch.float8_e4m3fn).float() if self.kind == "fp8" else codes.float()
            keys = numbers * scale.float()
            keys = keys + self._offset(i, encoded.start, keys)
            decoded[i] = (keys.to(self.dtype), values.to(self.dtype))
        return decoded

    def _offset(self, layer_idx: int, start: int, keys: Tensor) -> Tensor:
        """R_n μ for every position of `keys` [batch, heads, seq, dim], or zero."""
        if layer_idx not in self.means:
            return keys.new_zeros((), dtype=torch.float32)
        mean = self.means[layer_idx].to(keys.device, torch.float32)
        if mean.shape != (keys.shape[1], keys.shape[3]):
            raise CodecError(f"{self.name}: the means are not of keys {tuple(keys.shape)}: they are of another model")
        if layer_idx not in self.rotations:
            return mean[None, :, None]
        positions = torch.arange(start, start + keys.shape[2])[None]
        return rotated_mean(mean, self.rotations[layer_idx], positions)


def _to_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """Bytes of e4m3 numbers, and the scale [batch, 1, 1, 1] in float32."""
    largest = x.abs().amax((1, 2, 3), keepdim=True)
    scale = torch.where(largest > 0, largest / _FP8_MAX, 1)
    return (x / scale).clamp(-_FP8_MAX, _FP8_MAX).to(torch.float8_e4m3fn).view(torch.uint8), scale


def _to_int8(x: Tensor) -> tuple[Tensor, Tensor]:
    """Codes from −127 to 127, and the scale [batch, heads, seq, 1] in float16, rounded so that nothing is clipped."""
    largest = x.abs().amax(-1, keepdim=True)
    scale = scale_reaching(largest, _INT8_MAX)
    if not scale.isfinite().all():
        raise CodecError(f"keys up to {float(largest.max()):.3g} do not fit into float16 scales")
    divisor = torch.where(scale > 0, scale, 1).float()
    return (x / divisor).round().clamp(-_INT8_MAX, _INT8_MAX).to(torch.int8), scale
