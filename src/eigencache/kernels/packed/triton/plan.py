"""How a launch is divided: rows and blocks of a program, splits that fill a GPU, and where their blocks lie in memory."""

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
import triton
from torch import Tensor

from eigencache.modes import constant

FEW = 32  # most queries of a program for tiles [tokens, queries]
_PAIRED = 16  # most queries of a program for paired tiles
Tiles = tuple[int, int, int, int | None]  # blocks of a tile, warps, stages, and most registers of a thread
PAIRED_TILES: tuple[Tiles, ...] = (  # two warps per block: then no lane needs the data of another
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
_LEAST = 4  # fewest blocks of a split
_ROOM = 2**17  # bytes of shared memory that A100 and Hopper have, smaller GPUs do not


def describe_chunks(keys: Sequence[Tensor], others: Sequence[Tensor]) -> tuple[tuple[int, ...], ...]:
    """Return, per chunk, the offsets of keys and of others from the first chunk, their sequence strides, and its blocks.

    Offsets and strides are in units of 16 bytes.
    """
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
    """Divide all blocks, in their order, into pieces; a piece lies within one chunk and one split.

    Args:
        chunks: of `describe_chunks`.
        key_stride: words of a block of keys.
        other_stride: words of a block of `others`.
        splits: most splits; all but the last have the same number of blocks.
        device: device of the results.

    Returns:
        Pieces int64 [pieces, 6] with the columns offset of keys, offset of others, sequence stride of keys, sequence stride
        of others (in units of 16 bytes), number of blocks, and number of blocks before the piece; and the first piece of
        every split int32 [splits + 1].
    """
    total = sum(chunk[4] for chunk in chunks)
    each = -(-total // splits)
    pieces, ranges, before = [], [0], 0
    for key, other, key_batch, other_batch, blocks in chunks:
        start = 0
        while start < blocks:
            count = min(blocks - start, each - (before + start) % each)
            if (before + start) % each == 0 and pieces:
                ranges.append(len(pieces))
            offsets = key + start * key_stride // 4, other + start * other_stride // 4
            pieces.append((*offsets, key_batch, other_batch, count, before + start))
            start += count
        before += blocks
    ranges.append(len(pieces))
    return torch.tensor(pieces, device=device), torch.tensor(ranges, dtype=torch.int32, device=device)


def row_tile(rows: int, coefficients: int, device: torch.device) -> int:
    """Return the queries of a program, which registers and shared memory hold beside the sums of `coefficients`."""
    most = 128 if coefficients <= 128 else 64 if coefficients <= 256 else 32
    if device.type == "cuda" and torch.cuda.get_device_properties(device).shared_memory_per_block_optin < _ROOM:
        most //= 2
    return min(max(8, triton.next_power_of_2(rows)), most)


def pays(tile: int, parts: tuple[int, int], coefficients: tuple[int, int]) -> bool:
    """Return whether paired tiles are faster: they need no conversion to float16, but more padding for mixed widths."""
    return tile <= _PAIRED and all(4 * part <= 5 * all_ for part, all_ in zip(parts, coefficients, strict=True))


def splits_for(programs: int, blocks: int, slots: int) -> int:
    """Return in how many splits the blocks are read: the fewest that fill the GPU's slots within 10 % of the best number."""
    most = max(1, min(blocks // _LEAST, 128))
    filled = [programs * s / slots / math.ceil(programs * s / slots) for s in range(1, most + 1)]
    return next(s for s, share in enumerate(filled, 1) if share >= 0.9 * max(filled))


def slots_of(device: torch.device, tiles: Tiles) -> int:
    """Return how many programs run at a time: about 16 warps on a multiprocessor."""
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
    return processors * max(1, 16 // tiles[1])


def usual_tiles(tile: int, coefficients: int, paired: bool) -> Tiles:
    """Return the tiles for launches that are not measured."""
    if paired:
        return (1, 2, 1, None) if coefficients > 128 else (1, 2, 1, 128)
    return 1, 8 if tile > 32 or coefficients > 128 else 4, 1, None


def launch_options(tiles: Tiles) -> dict[str, int]:
    """Return tiles as keyword arguments of a launch."""
    blocks, warps, stages, registers = tiles
    return {"BLOCKS": blocks, "num_warps": warps, "num_stages": stages} | ({"maxnreg": registers} if registers else {})
