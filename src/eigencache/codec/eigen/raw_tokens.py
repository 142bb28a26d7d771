"""Tokens that `eigen` stores without a transform, as bytes: 16 bits per number, or 8 with a float16 scale per head and token.

Little-endian. With 8 bits the integers are symmetric, so that the error is at most half a step.
"""

import numpy as np
import torch
from torch import Tensor

from eigencache.codec.base import sixteen_bit, to_sixteen_bit
from eigencache.codec.quantization.grouped import require_finite
from eigencache.codec.quantization.integer import to_int8
from eigencache.errors import CodecError


def raw_nbytes(tokens: int, heads: list[int], bits: int) -> int:
    """Return the bytes of `tokens` vectors.

    Args:
        tokens: Number of vectors.
        heads: Width of every head of a vector.
        bits: 16 or 8.
    """
    return tokens * (2 * sum(heads) if bits == 16 else sum(heads) + 2 * len(heads))


def raw_bytes(x: Tensor, heads: list[int], bits: int) -> bytes:
    """Return vectors as bytes.

    Args:
        x: Vectors [tokens, width].
        heads: Width of every head of a vector.
        bits: 16 or 8.

    Raises:
        CodecError: x holds NaN, infinite values, or values that do not fit.
    """
    if bits == 16:
        return to_sixteen_bit(x.cpu(), "raw tokens").view(torch.int16).numpy().astype("<i2").tobytes()
    require_finite(x, "a raw token")
    codes, scales = zip(*(to_int8(head, "raw tokens") for head in x.float().cpu().split(heads, -1)), strict=True)
    packed = torch.cat(scales, -1).view(torch.int16).numpy().astype("<i2").tobytes()
    return packed + torch.cat(codes, -1).numpy().tobytes()


def raw_vectors(data: bytes | memoryview, tokens: int, heads: list[int], bits: int, dtype: torch.dtype) -> Tensor:
    """Return the vectors [tokens, width] that `raw_bytes` wrote.

    Args:
        data: The bytes.
        tokens: Number of vectors.
        heads: Width of every head of a vector.
        bits: 16 or 8.
        dtype: The model's.

    Raises:
        CodecError: `data` has another length.
    """
    if len(data) != (expected := raw_nbytes(tokens, heads, bits)):
        raise CodecError(f"Corrupt section: expected {expected} bytes for {tokens} raw tokens, found {len(data)}.")
    if bits == 16:
        numbers = torch.from_numpy(np.frombuffer(data, "<i2").astype(np.int16)).view(sixteen_bit(dtype))
        return numbers.view(tokens, sum(heads)).to(dtype)
    edge = 2 * tokens * len(heads)
    scales = torch.from_numpy(np.frombuffer(data[:edge], "<i2").astype(np.int16)).view(torch.float16).view(tokens, -1)
    codes = torch.from_numpy(np.frombuffer(data[edge:], np.int8).copy()).view(tokens, -1)
    widths = torch.tensor(heads)
    return (codes.float() * scales.float().repeat_interleave(widths, -1)).to(dtype)
