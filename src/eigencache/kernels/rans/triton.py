"""Decode the words of `cpu.py` on a GPU, all blocks in one launch, with the same integers and the same errors.

One warp decodes one block, one lane per thread, so the prefix sums by which lanes share a stream of words stay within a
warp. A block is serial in its coefficients; different blocks are decoded in parallel. The lanes that need a word set their
bits in one number; the word of a lane is as far ahead as there are set bits below its own. On a GPU this takes one
instruction each (redux, popc). All arithmetic is in unsigned 32 bits, and an entry of a table (index < 2^8, frequency and
place < 2^12) fits.
"""

# Triton specializes arguments, so the checker sees the wrong types here.
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false

from collections.abc import Sequence
from functools import lru_cache
from typing import Protocol

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from eigencache.errors import CodecError
from eigencache.kernels.rans.cpu import LOWER, MAX_LANES, PRECISION, SLOTS, WRONG_END, pack_slots, require_block
from eigencache.modes import constant

_LOWER, _PRECISION, _SLOTS = tl.constexpr(LOWER), tl.constexpr(PRECISION), tl.constexpr(SLOTS)
_WARP = tl.constexpr(MAX_LANES)


class StaticTables(Protocol):
    """Tables of a codec.

    Attributes:
        table_of: [coefficients] table of each coefficient.
        shifts: [tables] bits outside of each table.
        halves: [tables] largest integer of each table.
        starts: [tables, entries + 1] first slot of each entry, as for `pack_slots`.
        least_bits: fewest bits that a token can cost.
    """

    @property
    def table_of(self) -> np.ndarray: ...  # noqa: D102
    @property
    def shifts(self) -> np.ndarray: ...  # noqa: D102
    @property
    def halves(self) -> np.ndarray: ...  # noqa: D102
    @property
    def starts(self) -> np.ndarray: ...  # noqa: D102
    @property
    def least_bits(self) -> float: ...  # noqa: D102


def decode_blocks(
    sections: Sequence[bytes | memoryview],
    tokens: Sequence[int],
    tables: StaticTables,
    lanes: int,
    device: torch.device,
    out: Tensor | None = None,
) -> Tensor:
    """Decode blocks that `RansCoder` wrote.

    Args:
        sections: bytes of every block.
        tokens: number of tokens of every block.
        tables: tables of the codec.
        lanes: number of states of a block.
        device: device of the result.
        out: output int32 [blocks, coefficients, most tokens]; None allocates it. Elements beyond the tokens of a block are
            not written.

    Returns:
        `out`.

    Raises:
        CodecError: a block is corrupt, as in `RansCoder.decode`.
    """
    for data, count in zip(sections, tokens, strict=True):
        require_block(len(data), count, lanes, tables.least_bits)
    words, spans = upload_blocks(sections, tokens, lanes, device)
    if out is None:
        out = torch.empty(len(sections), len(tables.table_of), max(tokens), dtype=torch.int32, device=device)
    if bool(launch(words, spans, tables, lanes, out).any()):
        raise CodecError(WRONG_END)
    return out


def upload_blocks(
    sections: Sequence[bytes | memoryview], tokens: Sequence[int], lanes: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return the words of all sections uint16, and per block [blocks, 3] its first word, last word + 1 and tokens."""
    ends = np.cumsum([0, *(len(data) // 2 for data in sections)])
    words = torch.empty(int(ends[-1]), dtype=torch.uint16, pin_memory=device.type == "cuda")
    np.concatenate([np.frombuffer(data, np.uint16) for data in sections], out=words.numpy())
    spans = torch.from_numpy(np.stack([ends[:-1], ends[1:], tokens], 1))
    return words.to(device, non_blocking=True), spans.to(device)


def launch(words: Tensor, spans: Tensor, tables: StaticTables, lanes: int, out: Tensor) -> Tensor:
    """Decode into `out` without checks on the host.

    Args:
        words: of `upload_blocks`.
        spans: of `upload_blocks`.
        tables: tables of the codec.
        lanes: number of states of a block.
        out: output int32 [blocks, coefficients, most tokens].

    Returns:
        Faults int32 [blocks]: 1 where words or states do not end as an encoder's begin.
    """
    specs, slots = _uploaded(tables, out.device)
    faults = torch.empty(len(out), dtype=torch.int32, device=out.device)
    with torch.cuda.device_of(out):
        _decode[(len(out),)](words, spans, specs, slots, out, faults, *out.shape[1:], LANES=lanes, num_warps=1)
    return faults


@lru_cache(maxsize=4)
@constant
def _uploaded(tables: StaticTables, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return table << 16 | half << 8 | shift per coefficient int64, index | frequency << 8 | place << 20 per slot uint32."""
    t = tables.table_of.astype(np.int64)
    specs = (t << 16) | (tables.halves[t].astype(np.int64) << 8) | tables.shifts[t]
    wide = pack_slots(tables.starts, tables.halves)
    slots = ((wide & 0xFFFF) | ((wide >> 16 & 0xFFFF) << 8) | (wide >> 32 << 20)).astype(np.uint32)
    return torch.from_numpy(specs).to(device), torch.from_numpy(slots).to(device)


@triton.jit
def _set_bits(x):
    """Return the number of set bits of a uint32; compiles to one instruction."""
    x = x - ((x >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    return (x * 0x01010101) >> 24


@triton.jit
def _advanced(x, on, frequency, place, words, position, end):
    """Pop a symbol from the lanes that are `on`; return their states, with words loaded where needed, and the next word."""
    x = tl.where(on, frequency * (x >> _PRECISION) + place, x)
    dry = on & (x < _LOWER)
    bit = tl.full([_WARP], 1, tl.uint32) << tl.arange(0, _WARP).to(tl.uint32)
    all_dry = tl.sum(tl.where(dry, bit, 0), 0)
    from_here = _set_bits(all_dry & (bit - 1)).to(tl.int32)
    word = tl.load(words + position + from_here, mask=dry & (position + from_here < end), other=0)
    return tl.where(dry, (x << 16) | word.to(tl.uint32), x), position + _set_bits(all_dry).to(tl.int32)


@triton.jit
def _uniform(x, on, bits, words, position, end):
    """Pop a uniform number of 12 − `bits` bits from each lane that is `on`; return it, the states and the next word."""
    slot = x & (_SLOTS - 1)
    frequency = tl.full([_WARP], 1, tl.uint32) << bits
    x, position = _advanced(x, on, frequency, slot & (frequency - 1), words, position, end)
    return slot >> bits, x, position


@triton.jit
def _decode(words, spans, specs, slots, out, faults, width, stride, LANES: tl.constexpr):
    """Decode one block; `spans` as of `upload_blocks`."""
    block = tl.program_id(0).to(tl.int64)
    first_word = tl.load(spans + 3 * block)
    end = (tl.load(spans + 3 * block + 1) - first_word).to(tl.int32)
    tokens = tl.load(spans + 3 * block + 2).to(tl.int32)
    words += first_word
    out += block * width * stride
    lane = tl.arange(0, _WARP)
    low = tl.load(words + 2 * lane, mask=lane < LANES, other=0).to(tl.uint32)
    high = tl.load(words + 2 * lane + 1, mask=lane < LANES, other=_LOWER >> 16).to(tl.uint32)
    x = (high << 16) | low
    position = 2 * LANES
    for c in range(width):
        spec = tl.load(specs + c)
        shift, half = (spec & 0xFF).to(tl.int32), ((spec >> 8) & 0xFF).to(tl.int32)
        table = slots + (spec >> 16) * _SLOTS
        for first in range(0, tokens, LANES):
            on = (lane < LANES) & (first + lane < tokens)
            entry = tl.load(table + (x & (_SLOTS - 1)), mask=on, other=0)
            x, position = _advanced(x, on, (entry >> 8) & 0xFFF, entry >> 20, words, position, end)
            value = (entry & 0xFF).to(tl.int32) - half
            escaped = on & (value > half)
            if shift > 0:
                part, x, position = _uniform(x, on & (value <= half), _PRECISION - shift, words, position, end)
                value = (value << shift) + part.to(tl.int32)
            if tl.max(escaped.to(tl.int32), 0) > 0:
                wide = tl.zeros([_WARP], tl.uint32)
                for step in range(4):
                    part, x, position = _uniform(x, escaped, _PRECISION - 8, words, position, end)
                    wide |= part << (8 * step)
                value = tl.where(escaped, wide.to(tl.int32, bitcast=True), value)
            tl.store(out + first + lane, value, mask=on)
        out += stride
    unsound = tl.max((x != _LOWER).to(tl.int32), 0)
    tl.store(faults + block, unsound | (position != end).to(tl.int32))
