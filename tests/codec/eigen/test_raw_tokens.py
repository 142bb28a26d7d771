"""Tokens kept as they are: 16 bits lose nothing, 8 bits half a step, and their bytes are those of the arithmetic."""

import struct

import numpy as np
import pytest
import torch

from eigencache.codec.eigen.raw_tokens import raw_bytes, raw_nbytes, raw_vectors
from eigencache.errors import CodecError

HEADS = [8, 8, 3, 20]


def drawn(tokens: int, scale: float = 1.0) -> torch.Tensor:
    return torch.randn(tokens, sum(HEADS), generator=torch.Generator().manual_seed(tokens)) * scale


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("tokens", [0, 1, 7])
def test_sixteen_bits_are_exact_for_a_model_that_has_them(dtype: torch.dtype, tokens: int) -> None:
    x = drawn(tokens).to(dtype)
    assert torch.equal(raw_vectors(raw_bytes(x, HEADS, 16), tokens, HEADS, 16, dtype), x)


def test_sixteen_bits_of_a_wider_model_are_float16() -> None:
    x = drawn(5)
    assert torch.equal(raw_vectors(raw_bytes(x, HEADS, 16), 5, HEADS, 16, torch.float32), x.half().float())


@pytest.mark.parametrize("scale", [1e-6, 1e-3, 1.0, 1e4])
def test_eight_bits_lose_half_a_step_of_their_head_at_most(scale: float) -> None:
    x = drawn(9, scale)
    again = raw_vectors(raw_bytes(x, HEADS, 8), 9, HEADS, 8, torch.float32)
    for head, decoded in zip(x.split(HEADS, -1), again.split(HEADS, -1), strict=True):
        largest = head.abs().amax(-1, keepdim=True)
        step = largest / 127 * (1 + 2**-10) + 2**-24  # as float16 rounds it up
        assert bool(((decoded - head).abs() <= step / 2 * (1 + 1e-5)).all())


def test_a_head_of_zeros_stays_zero_beside_others() -> None:
    x = drawn(3)
    x[:, 8:16] = 0
    again = raw_vectors(raw_bytes(x, HEADS, 8), 3, HEADS, 8, torch.float32)
    assert not again[:, 8:16].any() and again[:, :8].all(-1).any()


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("tokens", [0, 1, 6])
def test_bytes_are_those_of_the_arithmetic(bits: int, tokens: int) -> None:
    expected = tokens * (2 * 39 if bits == 16 else 39 + 2 * 4)
    assert raw_nbytes(tokens, HEADS, bits) == expected == len(raw_bytes(drawn(tokens), HEADS, bits))


def test_bytes_are_little_endian_scales_before_codes() -> None:
    x = torch.tensor([[1.5, -127.0, 0.5, 0.25]])
    assert raw_bytes(x, [4], 16) == struct.pack("<4e", 1.5, -127, 0.5, 0.25)
    assert raw_bytes(x.bfloat16(), [4], 16) == (x.numpy().view("<u4") >> 16).astype("<u2").tobytes()
    assert raw_bytes(x, [2, 2], 8)[4:] == struct.pack("<4b", 2, -127, 127, 63)  # the second step is rounded up
    scales = np.frombuffer(raw_bytes(x, [2, 2], 8)[:4], "<f2")
    assert scales[0] == 1 and 0.5 / 127 <= scales[1] <= 0.5 / 127 * 1.001


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e8])
def test_what_does_not_fit_is_refused(bits: int, bad: float) -> None:
    x = drawn(4)
    x[2, 9] = bad
    with pytest.raises(CodecError, match="raw token"):
        raw_bytes(x, HEADS, bits)


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("change", [-1, 1])
def test_another_number_of_bytes_is_refused(bits: int, change: int) -> None:
    data = raw_bytes(drawn(4), HEADS, bits)
    with pytest.raises(CodecError, match=f"expected {len(data)} bytes for 4 raw tokens"):
        raw_vectors((data + b"\0")[: len(data) + change], 4, HEADS, bits, torch.float32)
