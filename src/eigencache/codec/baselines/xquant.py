"""`xquant`: stores the input of a layer in few bits and recomputes keys and values from it.

Source: Tomar et al., XQuant: Breaking the Memory Wall for LLM Inference with KV Cache Rematerialization, 2025, arXiv
2508.10395. What is cached is the input of a layer's projections, after its norm, x [hidden]; K = W_K x + b_K before
rotation and V = W_V x + b_V are recomputed from it. It helps where keys and values together are wider than x.

Differences: a cache holds K and V, so x is recovered from them, x = pinv([W_K; W_V]) ([K; V] − b), which is exact up to the
rounding of the cached numbers where the stacked weight has full column rank; the paper stores x directly. Quantized per
token, asymmetric, in groups of 128, lowest value and step in float16; the paper's grouping is not known to us.
Every layer has the same bits, and all tokens are quantized. Left out: XQuant-CL (differences between layers) and the
latents of an SVD for grouped-query attention. Models that normalize keys after the projection (Qwen3, Gemma 3) are
not supported, and nothing here detects them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from eigencache.codec.base import Cached, Encoded, layers_of, length_of, owned
from eigencache.codec.baselines.registry import BaselineInputs, Weights, baseline
from eigencache.codec.layout import Part, Rotations, by_layer, columns_of, rotated, slots_of, unrotated
from eigencache.codec.quantization.grouped import QuantizedGroups, dequantize, quantize, require_finite
from eigencache.errors import CodecError

_CONDITION = 1e-5  # singular values below this share of the largest count as zero


@dataclass(frozen=True, eq=False)
class XQuant:
    """XQuant of one model; `xquant` makes it.

    Args:
        weights: Layer → stacked projections [W_K; W_V] and their bias.
        inverses: Layer → pseudo-inverse of the weights [hidden, keys and values].
        kv_heads: Number of KV heads.
        rotations: Layer → slot 0 and its rotation.
        bits: Bits per number of an input, without scales.
        dtype: The model's.
        group: Numbers of an input that share lowest value and step.
    """

    weights: Weights
    inverses: Mapping[int, Tensor]
    kv_heads: int
    rotations: Rotations
    bits: Literal[2, 3, 4, 8]
    dtype: torch.dtype
    group: int = 128
    nbytes: int = 0  # the weights are the model's; the inverses only replace inputs that a model has

    @property
    def name(self) -> str:
        """`xquant 4 bit`."""
        return f"xquant {self.bits} bit"

    def encode(self, cached: Cached, start: int) -> Encoded:
        """Encode the input of every layer.

        Raises:
            CodecError: The cache holds NaN or infinite values, or a layer without weights.
        """
        for layer_idx, both in cached.items():
            if layer_idx not in self.weights:
                raise CodecError(f"{self.name} has no weights of layer {layer_idx}: it was made for another model")
            for x in both:
                require_finite(x, f"{self.name}: layer {layer_idx}")
        slots = unrotated(cached, self.rotations, start)
        tensors = {}
        for layer_idx in cached:
            columns = torch.cat([columns_of(slots, part).float() for part in self._parts(layer_idx)], -1)
            bias = self.weights[layer_idx][1]
            x = (columns if bias is None else columns - bias.to(columns)) @ self.inverses[layer_idx].to(columns).mT
            quantized = quantize(x, self.bits, min(self.group, x.shape[-1]), what=f"{self.name}: layer {layer_idx}")
            tensors |= {f"{layer_idx}.{part}": owned(tensor) for part, tensor in quantized._asdict().items()}
        return Encoded(tensors, start, length_of(cached))

    def decode(self, encoded: Encoded) -> dict[int, tuple[Tensor, Tensor]]:
        """Return keys and values recomputed from the inputs, keys rotated, in the model's dtype."""
        columns: list[tuple[Part, Tensor]] = []
        for layer_idx in layers_of(encoded.tensors):
            weight, bias = self.weights[layer_idx]
            groups = QuantizedGroups(*(encoded.tensors[f"{layer_idx}.{part}"] for part in QuantizedGroups._fields))
            x = dequantize(groups, self.bits, weight.shape[1], min(self.group, weight.shape[1]))
            y = x @ weight.to(x).mT
            keys, values = (y if bias is None else y + bias.to(y)).chunk(2, -1)
            columns += zip(self._parts(layer_idx), (keys, values), strict=True)
        present = {i: rotation for i, rotation in self.rotations.items() if f"{i}.codes" in encoded.tensors}
        return by_layer(rotated(slots_of(columns), present, encoded.start), self.dtype)

    def _parts(self, layer_idx: int) -> tuple[Part, Part]:
        dim = len(self.weights[layer_idx][0]) // 2 // self.kv_heads
        return tuple(Part(layer_idx, slot, (0, self.kv_heads), dim) for slot in (0, 1))  # type: ignore[return-value]


def xquant(
    weights: Weights,
    kv_heads: int,
    rotations: Rotations,
    bits: Literal[2, 3, 4, 8],
    dtype: torch.dtype,
    *,
    group: int = 128,
) -> XQuant:
    """Return XQuant for a model.

    Args:
        weights: Layer → stacked projections W_K over W_V `[keys and values, hidden]`, and their bias or None.
        kv_heads: Number of KV heads.
        rotations: Layer → slot 0 and its rotation; layers without rotation are left out.
        bits: Bits per number of an input, without scales.
        dtype: The model's.
        group: Numbers of an input that share lowest value and step.

    Raises:
        CodecError: The input cannot be recovered: keys and values are narrower than it, or the weights are rank-deficient.
    """
    inverses = {i: _pseudo_inverse(weight, i, kv_heads) for i, (weight, _) in weights.items()}
    return XQuant(weights, inverses, kv_heads, rotations, bits, dtype, group)


def _pseudo_inverse(weight: Tensor, layer_idx: int, kv_heads: int) -> Tensor:
    """Return the pseudo-inverse [hidden, keys and values] in float32, computed in float64."""
    rows, hidden = weight.shape
    if rows % (2 * kv_heads):
        raise CodecError(f"xquant: layer {layer_idx} has {rows} keys and values, which {kv_heads} heads cannot share")
    if rows < hidden:
        raise CodecError(
            f"xquant: layer {layer_idx} has {rows} keys and values for {hidden} inputs: the inputs cannot be recovered"
        )
    u, s, vh = torch.linalg.svd(weight.double(), full_matrices=False)
    if s[-1] <= _CONDITION * s[0]:
        raise CodecError(f"xquant: the weights of layer {layer_idx} are rank-deficient: the inputs cannot be recovered")
    return ((vh.mT / s) @ u.mT).float()


@baseline("xquant", "XQuant: stores the layer's input, recomputes K and V")
def xquant_codecs(inputs: BaselineInputs) -> dict[str, XQuant]:
    """Return the codecs of 8, 4, 3 and 2 bits."""
    weights, kv_heads, rotations = inputs.projections
    return {f"{b}": xquant(weights, kv_heads, rotations, b, inputs.dtype) for b in (8, 4, 3, 2)}  # type: ignore[arg-type]
