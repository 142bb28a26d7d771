"""Codes of b bits take b bits, lowest first, in a storage that holds nothing else, and come back."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eigencache.codec.quantization.bitpack import WIDTHS, pack, unpack
from eigencache.errors import CodecError


@settings(max_examples=80, deadline=None)
@given(bits=st.sampled_from(WIDTHS), count=st.integers(1, 41), seed=st.integers(0, 999))
def test_codes_come_back_from_as_many_bytes_as_they_need(bits: int, count: int, seed: int) -> None:
    codes = torch.randint(2**bits, (2, 3, count), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (2, 3, -(-count * bits // 8))
    assert packed.untyped_storage().nbytes() == packed.nbytes
    assert torch.equal(unpack(packed, bits, count), codes)


@pytest.mark.parametrize(
    ("bits", "codes", "packed"),
    [
        (1, [1, 0, 0, 0, 0, 0, 0, 1, 1], [0x81, 0x01]),
        (2, [1, 2, 3, 0, 3], [0b00111001, 0b11]),
        (3, [7, 0, 5, 1], [0b01000111, 0b0011]),
        (3, [0, 0, 0, 0, 0, 0, 0, 7], [0, 0, 0b11100000]),
        (4, [0xA, 0xB, 0xC], [0xBA, 0x0C]),
        (8, [255, 1], [255, 1]),
    ],
)
def test_the_lowest_bits_come_first(bits: int, codes: list[int], packed: list[int]) -> None:
    assert pack(torch.tensor(codes, dtype=torch.uint8), bits).tolist() == packed


def test_other_widths_are_refused() -> None:
    with pytest.raises(CodecError, match="bits=5 cannot be packed"):
        pack(torch.zeros(8, dtype=torch.uint8), 5)
