"""Random static tables, and functions that the process with Triton's interpreter runs."""

from collections.abc import Sequence

import numpy as np
import torch

from eigencache.codec.base import EncodedBytes
from eigencache.codec.eigen.codec import EigenCodec
from eigencache.codec.eigen.entropy_tables import EntropyTables
from eigencache.kernels.rans.cpu import SLOTS

GARBAGE = 123_456_789  # initial value of outputs
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def random_tables(rng, count):
    """Return shifts, halves and starts of `count` random tables."""
    shifts = rng.integers(0, 6, count).astype(np.int32)
    halves = rng.integers(1, 12, count).astype(np.int32)
    starts = np.full((count, 2 * 12 + 3), SLOTS, np.int32)
    for table, half in enumerate(halves):
        inner = np.sort(rng.choice(np.arange(1, SLOTS), 2 * half + 1, replace=False))
        starts[table, : 2 * half + 3] = [0, *inner, SLOTS]
    return shifts, halves, starts


def decoded_by_triton(sections: Sequence[bytes], tokens: Sequence[int], tables: EntropyTables, lanes: int) -> np.ndarray:
    """Decode sections with the Triton kernel; elements that it does not write are `GARBAGE`."""
    from eigencache.kernels.rans.triton import decode_blocks

    out = torch.full((len(sections), len(tables.table_of), max(tokens)), GARBAGE, dtype=torch.int32, device=DEVICE)
    return decode_blocks(sections, tokens, tables, lanes, DEVICE, out).cpu().numpy()


def keys_of_first_layer(codec: EigenCodec, encoded: EncodedBytes, tokens: slice) -> np.ndarray:
    """Decode the keys of the first layer."""
    return codec.to(DEVICE).decode(encoded, tokens)[0][0].cpu().numpy()
