"""Tokens that a codec keeps as they are: 16 bits a number, or 8 with a float16 scale per head and token, as bytes.

Little-endian; 8 bits are symmetric, the largest magnitude of a head at 127, so that the error is at most half a step.
"""

import numpy as np
import torch
from torch import Tensor

from eigencache.codec.base import sixteen_bit, to_sixteen_bit
from eigencache.codec.quantization.grouped import scale_reaching
from eigencache.errors import CodecError

_LARGEST = 127


def raw_nbytes(tokens: int, heads: list[int], bits: int) -> int:
    """Bytes of `tokens` vectors; `heads`: the numbers of every head in a vector."""
    return tokens * (2 * sum(heads) if bits == 16 else sum(heads) + 2 * len(heads))


def raw_bytes(x: Tensor, heads: list[int], bits: int) -> bytes:
    """Vectors [tokens, width] as bytes. Raises `CodecError` for NaN and for numbers that 16 bits cannot hold."""
    if bits == 16:
        return to_sixteen_bit(x.cpu(), "kept tokens").view(torch.int16).numpy().astype("<i2").tobytes()
    codes, scales = [], []
    for head in x.float().cpu().split(heads, -1):
        largest = head.abs().amax(-1)
        scale = scale_reaching(largest, _LARGEST)
        if not scale.isfinite().all():
            raise CodecError(f"kept tokens hold NaN or numbers up to {float(largest.max()):.3g}: keep them in 16 bits")
        divisor = torch.where(scale > 0, scale, 1).float()
        codes.append((head / divisor[:, None]).round().clamp(-_LARGEST, _LARGEST).to(torch.int8))
        scales.append(scale)
    packed = torch.stack(scales, -1).view(torch.int16).numpy().astype("<i2").tobytes()
    return packed + torch.cat(codes, -1).numpy().tobytes()


def raw_vectors(data: bytes | memoryview, tokens: int, heads: list[int], bits: int, dtype: torch.dtype) -> Tensor:
    """Vectors [tokens, width] again, in `dtype`, the model's. Raises `CodecError` for another number of bytes."""
    if len(data) != raw_nbytes(tokens, heads, bits):
        raise CodecError(f"kept tokens of {len(data)} bytes, {raw_nbytes(tokens, heads, bits)} are needed")
    if bits == 16:
        numbers = torch.from_numpy(np.frombuffer(data, "<i2").astype(np.int16)).view(sixteen_bit(dtype))
        return numbers.view(tokens, sum(heads)).to(dtype)
    edge = 2 * tokens * len(heads)
    scales = torch.from_numpy(np.frombuffer(data[:edge], "<i2").astype(np.int16)).view(torch.float16).view(tokens, -1)
    codes = torch.from_numpy(np.frombuffer(data[edge:], np.int8).copy()).view(tokens, -1)
    widths = torch.tensor(heads)
    return (codes.float() * scales.float().repeat_interleave(widths, -1)).to(dtype)
