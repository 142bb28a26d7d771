"""Tokens that `eigen` stores without a transform: 16 bits per number, or 8 with a float16 scale per head and token.

Little-endian. With 8 bits the integers are symmetric, so that the error is at most half a step.
"""

import numpy as np
import torch
from torch import Tensor

from eigencache.codec.base import Cached, length_of, sixteen_bit, to_sixteen_bit
from eigencache.codec.eigen.container import Reader
from eigencache.codec.layout import Layout, Slots
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
        raise CodecError(f"corrupt section: expected {expected} bytes for {tokens} raw tokens, found {len(data)}")
    if bits == 16:
        numbers = torch.from_numpy(np.frombuffer(data, "<i2").astype(np.int16)).view(sixteen_bit(dtype))
        return numbers.view(tokens, sum(heads)).to(dtype)
    edge = 2 * tokens * len(heads)
    scales = torch.from_numpy(np.frombuffer(data[:edge], "<i2").astype(np.int16)).view(torch.float16).view(tokens, -1)
    codes = torch.from_numpy(np.frombuffer(data[edge:], np.int8).copy()).view(tokens, -1)
    widths = torch.tensor(heads)
    return (codes.float() * scales.float().repeat_interleave(widths, -1)).to(dtype)


def ends_of(cached: Cached, span: range, layout: Layout, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the vectors [batch, len(span), width] of a few tokens as the cache holds them, keys after rotation.

    Args:
        cached: The whole stretch.
        span: Its first or last tokens, counted from 0; tokens of them that a layer lacks are zero.
        layout: The layout of the codec.
        dtype: The model's.
        device: Where the vectors are needed.
    """
    if not span:
        return torch.zeros(len(next(iter(cached.values()))[0]), 0, layout.width, device=device)
    behind = length_of(cached) - span.stop

    def end(x: Tensor) -> Tensor:
        return x[:, :, : x.shape[2] - behind][:, :, -len(span) :]

    ends = {i: (end(keys), end(values)) for i, (keys, values) in cached.items()}
    zeros = torch.zeros(layout.width, device=device)
    return Layout(layout.parts, {}).vectors(ends, span.start, zeros).to(dtype)


def raw_slots(readers: list[Reader], span: range, layout: Layout, dtype: torch.dtype, device: torch.device) -> Slots:
    """Return the raw tokens of containers that share a header.

    Args:
        readers: One container per row of the batch.
        span: Tokens of one section, counted from the container's first.
        layout: The layout of the codec; raw tokens are stored after rotation.
        dtype: The model's.
        device: Where the slots are needed.

    Raises:
        CodecError: A section is damaged.
    """
    header = readers[0].header
    (section,) = header.sections_of(span)
    stored, heads = header.tokens_of(section), layout.head_widths
    rows = [raw_vectors(r.section(section), len(stored), heads, header.kept_bits, dtype) for r in readers]
    x = torch.stack(rows)[:, span.start - stored.start : span.stop - stored.start].to(device)
    return Layout(layout.parts, {}).slots(x, header.start + span.start)
