"""Packing of b-bit codes: n codes take ⌈n·b / 8⌉ bytes, the lowest bits first, and are unpacked exactly."""

import math

import torch
from torch import Tensor

from eigencache.codec.base import owned
from eigencache.errors import CodecError

WIDTHS = (1, 2, 3, 4, 8)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack codes along the last dimension.

    Args:
        codes: Integers [..., n] from 0 to 2^bits − 1.
        bits: Bits per code: 1, 2, 3, 4 or 8.

    Returns:
        Bytes [..., ⌈n·bits / 8⌉] in uint8 with a storage of their own; the last byte of a row is filled with zero bits.

    Raises:
        CodecError: Another `bits`.
    """
    per_word, word = _word(bits)
    if bits == 8:
        return owned(codes.to(torch.uint8))
    nbytes = -(-codes.shape[-1] * bits // 8)
    codes = torch.nn.functional.pad(codes, (0, -codes.shape[-1] % per_word))
    words = codes[..., ::per_word].to(word)
    for i in range(1, per_word):
        words = words | (codes[..., i::per_word].to(word) << (bits * i))
    if word == torch.uint8:
        return owned(words)
    parts = torch.stack([(words >> (8 * i)) & 255 for i in range(per_word * bits // 8)], -1)
    return owned(parts.flatten(-2).to(torch.uint8)[..., :nbytes])


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """Return the first `count` codes of every row, uint8 [..., count].

    Raises:
        CodecError: Another `bits` than 1, 2, 3, 4 or 8.
    """
    per_word, word = _word(bits)
    if bits == 8:
        return packed[..., :count]
    words = packed
    if word != torch.uint8:
        per_bytes = per_word * bits // 8
        filled = torch.nn.functional.pad(packed, (0, -packed.shape[-1] % per_bytes)).to(word)
        words = filled[..., ::per_bytes]
        for i in range(1, per_bytes):
            words = words | (filled[..., i::per_bytes] << (8 * i))
    codes = torch.stack([(words >> (bits * i)) & (2**bits - 1) for i in range(per_word)], -1)
    return codes.flatten(-2)[..., :count].to(torch.uint8)


def _word(bits: int) -> tuple[int, torch.dtype]:
    """Return how many codes fill whole bytes, and the dtype in which those bytes are assembled."""
    if bits not in WIDTHS:
        raise CodecError(f"bits={bits} cannot be packed: use {', '.join(map(str, WIDTHS[:-1]))} or {WIDTHS[-1]}")
    per_word = 8 // math.gcd(bits, 8)
    return per_word, torch.uint8 if per_word * bits == 8 else torch.int32
