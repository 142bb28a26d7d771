"""Entropy coders behind one interface: integers [coefficients, tokens] ⇄ bytes that decode on their own, exactly.

`RansCoder` is what codecs use. Others are measured beside it by `benchmarks/entropy.py`; `docs/entropy.md` has the table.
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from eigencache.codec.eigen.entropy_tables import EntropyTables
from eigencache.errors import CodecError
from eigencache.kernels.rans.cpu import LOWER, WRONG_END, decode_words, encode_words, require_block


class EntropyCoder(Protocol):
    """Integers ⇄ bytes, one block at a time."""

    def encode(self, symbols: np.ndarray) -> bytes:
        """The bytes of a block of int32 [coefficients, tokens]."""
        ...

    def decode(self, data: bytes | memoryview, tokens: int) -> np.ndarray:
        """The block again. Raises `CodecError` for bytes that no block has."""
        ...


@dataclass(frozen=True, eq=False)
class RansCoder:
    """Static tables and `lanes` interleaved states: 4 bytes per lane, then 16-bit words, little-endian."""

    tables: EntropyTables
    lanes: int

    def encode(self, symbols: np.ndarray) -> bytes:
        """States, then words in the order in which they are read."""
        t = self.tables
        words = np.empty(3 * symbols.size + self.lanes, np.uint16)
        states = np.full(self.lanes, LOWER, np.uint64)
        symbols = np.ascontiguousarray(symbols, np.int32)
        at = encode_words(symbols, t.table_of, t.shifts, t.halves, t.starts, self.lanes, words, states)
        return states.astype("<u4").tobytes() + words[at:].astype("<u2").tobytes()

    def decode(self, data: bytes | memoryview, tokens: int) -> np.ndarray:
        """Integers int32 [coefficients, tokens]; the states must end as an encoder's begin."""
        t, header = self.tables, 4 * self.lanes
        require_block(len(data), tokens, self.lanes, t.least_bits)
        states = np.frombuffer(data, "<u4", self.lanes).astype(np.uint32)
        words = np.frombuffer(data, "<u2", offset=header).astype(np.uint16, copy=False)
        out = np.empty((len(t.table_of), tokens), np.int32)
        used = decode_words(words, states, t.table_of, t.shifts, t.halves, t.slots, self.lanes, out)
        if used != len(words) or (states != LOWER).any():
            raise CodecError(WRONG_END)
        return out
