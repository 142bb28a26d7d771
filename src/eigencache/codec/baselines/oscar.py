"""`oscar`: keys in the eigenbasis of the queries, values in that of attended values, Hadamard-mixed, clipped, 2 bits.

Source: OSCAR: Offline Spectral Covariance-Aware Rotation for 2-bit KV Cache Quantization, 2026, arXiv 2605.17757,
github.com/FutureMLS-Lab/OSCAR. Per layer and KV head a basis U·H·P: eigenvectors of the second moment of the queries (for
keys) or of the values weighted by attention (for values), a Hadamard matrix, and a bit-reversed order. A token's vector
is clipped at a quantile of its own magnitudes (0.96 for keys, 0.92 for values in the repository's recipes), then
quantized asymmetrically in groups of 128 numbers of a head; keys after rotation; the first 64 tokens and the last 256 in
16 bits. For MLA the latent counts as keys, and the rotary key stays in 16 bits: pass no value moments for such layers.

Differences: for heads whose width is no power of two, a seeded random orthogonal matrix replaces H·P; quantiles can be
chosen on calibration vectors (`clip_candidates`), the same for all layers; lowest value and step in float16 (2.25 bits per
number of a head of 128, the figure of the paper), where the repository's recipes store them in float32. The repository's
variant with a Lloyd–Max codebook is left out. The caller computes the moments, and so their weights.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from eigencache.codec.base import Cached
from eigencache.codec.baselines.per_slot import PerSlot, Tensors
from eigencache.codec.baselines.registry import BaselineInputs, Moments, baseline
from eigencache.codec.baselines.turboquant import random_orthogonal
from eigencache.codec.quantization.grouped import QuantizedGroups, dequantize, quantize
from eigencache.codec.sinks_and_window import WithSinksAndWindow
from eigencache.errors import CodecError

PUBLISHED_CLIPS = (0.96, 0.92)  # keys, values
CLIPS = (1.0, 0.98, 0.96, 0.94, 0.92, 0.9, 0.86, 0.82)


@dataclass(frozen=True, eq=False)
class OSCAR(PerSlot):
    """The quantized part of OSCAR; `fit_oscar` makes it.

    Args:
        bases: (layer, slot) → orthogonal matrices [kv_heads, d, d]; slots without one stay in 16 bits.
        clips: Quantiles of magnitudes at which keys and values are clipped.
        bits: Bits per number, without scales.
        dtype: The model's.
        group: Numbers of a head that share lowest value and step.
    """

    bases: Mapping[tuple[int, int], Tensor]
    clips: tuple[float, float]
    bits: Literal[2, 3, 4]
    dtype: torch.dtype
    group: int = 128

    @property
    def name(self) -> str:
        """`oscar 2 bit`."""
        return f"oscar {self.bits} bit"

    @property
    def nbytes(self) -> int:
        """Bytes of all bases."""
        return sum(basis.nbytes for basis in self.bases.values())

    def is_raw(self, layer_idx: int, slot: int) -> bool:
        """Return whether the slot has no basis. Raises `CodecError` for a layer without any."""
        if (layer_idx, 0) not in self.bases:
            raise CodecError(f"{self.name} has no basis for layer {layer_idx}: it was fitted on another model")
        return (layer_idx, slot) not in self.bases

    def slot_encoded(self, x: Tensor, layer_idx: int, slot: int, what: str) -> Tensors:
        """Return codes, lowest values and steps of the clipped coordinates."""
        basis = self.bases[layer_idx, slot].to(x.device)
        if basis.shape != (x.shape[1], x.shape[3], x.shape[3]):
            raise CodecError(f"{what} has other heads than {self.name} was fitted for")
        y = clipped(x.float() @ basis, self.clips[slot])
        return quantize(y, self.bits, min(self.group, y.shape[-1]), what=what)._asdict()

    def slot_decoded(self, parts: Tensors, layer_idx: int, slot: int, width: int) -> Tensor:
        """Return the vectors."""
        y = dequantize(QuantizedGroups(**parts), self.bits, width, min(self.group, width))
        return y @ self.bases[layer_idx, slot].to(y.device).mT


def fit_oscar(
    key_moments: Moments,
    value_moments: Moments,
    dtype: torch.dtype,
    *,
    bits: Literal[2, 3, 4] = 2,
    sample: Cached | None = None,
    clip_candidates: tuple[float, ...] = CLIPS,
    sinks: int = 64,
    window: int = 256,
    group: int = 128,
    seed: int = 0,
) -> WithSinksAndWindow:
    """Fit OSCAR to second moments.

    Args:
        key_moments: Layer → second moments of the queries [kv_heads, d, d].
        value_moments: Layer → second moments of the attended values [kv_heads, d, d].
        dtype: The model's.
        bits: Bits per number, without scales.
        sample: A cache, keys after rotation, on which clips are chosen: those with the least relative error, summed over
            layers, in the metric of the queries for keys and Frobenius for values. None: the published clips.
        clip_candidates: Clips to try on `sample`.
        sinks: First positions in 16 bits.
        window: Last tokens in 16 bits.
        group: Numbers of a head that share lowest value and step.
        seed: Seed of the random matrices of heads whose width is no power of two.

    Raises:
        CodecError: Moments hold NaN or infinite values.
    """
    moments = {(i, slot): m for slot, layers in enumerate((key_moments, value_moments)) for i, m in layers.items()}
    bases = {key: _basis(m, seed) for key, m in moments.items()}
    codec = OSCAR(bases, PUBLISHED_CLIPS, bits, dtype, group)
    if sample is not None:
        losses = [[_loss(codec, key_moments, sample, slot, clip) for clip in clip_candidates] for slot in (0, 1)]
        keys, values = (clip_candidates[tried.index(min(tried))] for tried in losses)
        codec = OSCAR(bases, (keys, values), bits, dtype, group)
    return WithSinksAndWindow(codec, dtype, sinks, window)


def clipped(y: Tensor, ratio: float) -> Tensor:
    """Clip every vector at its magnitude of rank `⌊ratio·d⌋`, counted from 0 for the smallest; ratio 1 clips nothing."""
    index = min(int(ratio * y.shape[-1]), y.shape[-1] - 1)
    limit = y.abs().sort(-1).values[..., index : index + 1]
    return torch.minimum(torch.maximum(y, -limit), limit)


def hadamard(width: int) -> Tensor:
    """Return the normalized Hadamard matrix of a power of two, float64."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < width:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)]) / 2**0.5
    return matrix


def _basis(moments: Tensor, seed: int) -> Tensor:
    """Return U·H·P per head in float32: eigenvectors by rising eigenvalue, from the last on in bit-reversed order."""
    width = moments.shape[-1]
    if not moments.isfinite().all():
        raise CodecError("oscar: second moments hold NaN or infinite values")
    vectors = torch.linalg.eigh((moments.double() + moments.double().mT) / 2).eigenvectors
    if width & (width - 1):
        return (vectors @ random_orthogonal(width, seed).double().to(vectors.device)).float()
    digits = width.bit_length() - 1
    order = torch.zeros(width, dtype=torch.long)
    for i in range(width):
        order[int(f"{i:0{digits}b}"[::-1], 2) if digits else 0] = width - 1 - i
    return (vectors @ hadamard(width).to(vectors.device))[..., order.to(vectors.device)].float()


def _loss(codec: OSCAR, key_moments: Moments, sample: Cached, slot: int, clip: float) -> float:
    """Return the relative error with one clip for all layers, summed over layers."""
    tried = OSCAR(codec.bases, (clip, clip), codec.bits, torch.float32, codec.group)
    total = 0.0
    for layer_idx, both in sample.items():
        x = both[slot].float()
        if (layer_idx, slot) not in codec.bases:
            continue
        error = tried.slot_decoded(tried.slot_encoded(x, layer_idx, slot, "the sample"), layer_idx, slot, x.shape[-1]) - x
        metric = key_moments[layer_idx].to(x) if slot == 0 else torch.eye(x.shape[-1]).to(x)
        total += float(((error @ metric) * error).sum() / ((x @ metric) * x).sum().clamp_min(1e-30))
    return total


def _published(inputs: BaselineInputs, **sizes: int) -> dict[str, WithSinksAndWindow]:
    """Return the codecs of 4, 3 and 2 bits with sinks and window of the given sizes; bases and clips are fitted once."""

    def fitted(bits: int) -> WithSinksAndWindow:
        fit = lambda: fit_oscar(*inputs.moments, inputs.dtype, bits=bits, sample=inputs.cached)  # type: ignore[arg-type]  # noqa: E731
        return inputs.once(f"oscar {bits}", fit)

    return {f"{bits}": replace(fitted(bits), **sizes) for bits in (4, 3, 2)}


@baseline("oscar", "OSCAR, 64 sinks and last 256 tokens in 16 bits", fitted=True)
def oscar_codecs(inputs: BaselineInputs) -> dict[str, WithSinksAndWindow]:
    """Return the codecs of 4, 3 and 2 bits."""
    return _published(inputs, sinks=64, window=256)


@baseline("oscar-no-window", "OSCAR without sinks and window", fitted=True)
def oscar_codecs_without_window(inputs: BaselineInputs) -> dict[str, WithSinksAndWindow]:
    """Return the codecs of 4, 3 and 2 bits that quantize all tokens."""
    return _published(inputs, sinks=0, window=0)
