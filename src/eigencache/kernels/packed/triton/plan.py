"""How a launch is cut: rows and blocks of a program, splits that fill a GPU, and where their blocks lie in memory."""

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
import triton
from torch import Tensor

from eigencache.modes import constant

FEW = 32  # queries of a program, up to which tiles are tokens by queries
_PAIRED = 16  # up to which pairs pay
Tiles = tuple[int, int, int, int | None]  # blocks at a time, warps, stages, and registers of a thread at most
PAIRED_TILES: tuple[Tiles, ...] = (  # two warps to a block: then no lane needs what another one has
    (1, 2, 1, None),
    (1, 2, 1, 128),
    (1, 2, 2, None),
    (1, 2, 2, 128),
    (1, 2, 3, 128),
    (2, 4, 1, None),
    (2, 4, 2, None),
    (2, 4, 2, 128),
)
TILES: tuple[Tiles, ...] = ((1, 8, 1, None), (1, 8, 2, None), (2, 8, 1, None), (1, 4, 1, None))
_LEAST = 4  # blocks of a split
_ROOM = 2**17  # bytes of shared memory, as A100 and Hopper have and smaller GPUs have not


def described(keys: Sequence[Tensor], others: Sequence[Tensor]) -> tuple[tuple[int, ...], ...]:
    """Of every chunk: where both begin after the first chunk's, in 16 bytes, strides of a sequence in these, and blocks."""
    return tuple(
        (
            (k.data_ptr() - keys[0].data_ptr()) // 16,
            (o.data_ptr() - others[0].data_ptr()) // 16,
            k.stride(0) // 4,
            o.stride(0) // 4,
            k.shape[1],
        )
        for k, o in zip(keys, others, strict=True)
    )


@lru_cache(maxsize=4096)
@constant
def pieces_of(
    chunks: tuple[tuple[int, ...], ...], key_stride: int, other_stride: int, splits: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """All blocks once and in their order, in at most so many splits alike: pieces [pieces, 6], and where splits begin.

    Of a piece, which lies within a chunk: both offsets and both strides of a sequence in 16 bytes, its blocks, those before.
    """
    total = sum(chunk[4] for chunk in chunks)
    each = -(-total // splits)
    pieces, ranges, passed = [], [0], 0
    for key, other, key_batch, other_batch, blocks in chunks:
        at = 0
        while at < blocks:
            count = min(blocks - at, each - (passed + at) % each)
            if (passed + at) % each == 0 and pieces:
                ranges.append(len(pieces))
            where = key + at * key_stride // 4, other + at * other_stride // 4
            pieces.append((*where, key_batch, other_batch, count, passed + at))
            at += count
        passed += blocks
    ranges.append(len(pieces))
    return torch.tensor(pieces, device=device), torch.tensor(ranges, dtype=torch.int32, device=device)


def row_tile(rows: int, coefficients: int, device: torch.device) -> int:
    """Queries of a program: what registers and shared memory have room for beside sums of so many coefficients."""
    most = 128 if coefficients <= 128 else 64 if coefficients <= 256 else 32
    if device.type == "cuda" and torch.cuda.get_device_properties(device).shared_memory_per_block_optin < _ROOM:
        most //= 2
    return min(max(8, triton.next_power_of_2(rows)), most)


def pays(tile: int, parts: tuple[int, int], coefficients: tuple[int, int]) -> bool:
    """Whether tiles of pairs do less: they have no conversion of halves, but more padding where widths are mixed."""
    return tile <= _PAIRED and all(4 * part <= 5 * all_ for part, all_ in zip(parts, coefficients, strict=True))


def splits_for(programs: int, blocks: int, slots: int) -> int:
    """In how many parts blocks are read so that a GPU's slots are filled evenly: the fewest within a tenth of the best."""
    most = max(1, min(blocks // _LEAST, 128))
    filled = [programs * s / slots / math.ceil(programs * s / slots) for s in range(1, most + 1)]
    return next(s for s, share in enumerate(filled, 1) if share >= 0.9 * max(filled))


def slots_of(device: torch.device, tiles: Tiles) -> int:
    """Programs that run at a time: about 16 warps on a processor."""
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
    return processors * max(1, 16 // tiles[1])


def usual(tile: int, coefficients: int, paired: bool) -> Tiles:
    """Where nothing is measured."""
    if paired:
        return (1, 2, 1, None) if coefficients > 128 else (1, 2, 1, 128)
    return 1, 8 if tile > 32 or coefficients > 128 else 4, 1, None


def options(tiles: Tiles) -> dict[str, int]:
    """What a launch takes."""
    blocks, warps, stages, registers = tiles
    return {"BLOCKS": blocks, "num_warps": warps, "num_stages": stages} | ({"maxnreg": registers} if registers else {})
