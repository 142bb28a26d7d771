"""Symmetric int8 with a float16 scale per vector: the largest magnitude has code 127, the error is at most half a step."""

import torch
from torch import Tensor

from eigencache.codec.quantization.scales import divisor, scale_reaching
from eigencache.errors import CodecError

INT8_MAX = 127


def to_int8(x: Tensor, what: str) -> tuple[Tensor, Tensor]:
    """Quantize vectors along the last dimension.

    Args:
        x: Vectors [..., n] in float32.
        what: What the vectors are, to begin an error message.

    Returns:
        Codes [..., n] in int8 from −127 to 127, and scales [..., 1] in float16, rounded so that nothing is clipped.

    Raises:
        CodecError: A magnitude is too large for a float16 scale, or NaN.
    """
    largest = x.abs().amax(-1, keepdim=True)
    scale = scale_reaching(largest, INT8_MAX)
    if not scale.isfinite().all():
        raise CodecError(f"{what}: magnitudes up to {float(largest.max()):.3g} do not fit into float16 scales")
    return (x / divisor(scale)).round().clamp(-INT8_MAX, INT8_MAX).to(torch.int8), scale


def from_int8(codes: Tensor, scale: Tensor) -> Tensor:
    """Return the vectors [..., n] in float32."""
    return codes.float() * scale.float()
