"""Entropy coders behind one interface: integers [coefficients, tokens] ⇄ the bytes of a block, without loss.

Codecs use `RansCoder`. `benchmarks/entropy.py` measures other coders through the same interface; `docs/entropy.md` has the
table.
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from eigencache.codec.eigen.entropy_tables import EntropyTables
from eigencache.codec.eigen.threads import parallel
from eigencache.errors import CodecError
from eigencache.kernels.rans.backend import Backend, choose_backend
from eigencache.kernels.rans.cpu import LOWER, WRONG_END, decode_words, encode_words, require_block


class EntropyCoder(Protocol):
    """Encodes and decodes one block at a time."""

    def encode(self, symbols: np.ndarray) -> bytes:
        """Return the bytes of a block of int32 [coefficients, tokens]."""
        ...

    def decode(self, data: bytes | memoryview, tokens: int) -> np.ndarray:
        """Return the block. Raises `CodecError` for bytes that no encoder writes."""
        ...


@dataclass(frozen=True, eq=False)
class RansCoder:
    """rANS with static tables and `lanes` interleaved states: 4 bytes per lane, then 16-bit words, little-endian."""

    tables: EntropyTables
    lanes: int

    def encode(self, symbols: np.ndarray) -> bytes:
        """Return the bytes of a block of int32 [coefficients, tokens]: states, then words in reading order."""
        t = self.tables
        words = np.empty(3 * symbols.size + self.lanes, np.uint16)
        states = np.full(self.lanes, LOWER, np.uint64)
        symbols = np.ascontiguousarray(symbols, np.int32)
        first = encode_words(symbols, t.table_of, t.shifts, t.halves, t.starts, self.lanes, words, states)
        return states.astype("<u4").tobytes() + words[first:].astype("<u2").tobytes()

    def decode(self, data: bytes | memoryview, tokens: int) -> np.ndarray:
        """Decode a block.

        Args:
            data: Its bytes.
            tokens: Its number of tokens.

        Returns:
            Integers int32 [coefficients, tokens].

        Raises:
            CodecError: The bytes cannot hold this number of tokens, or the states do not end where an encoder begins.
        """
        t, header = self.tables, 4 * self.lanes
        require_block(len(data), tokens, self.lanes, t.least_bits)
        states = np.frombuffer(data, "<u4", self.lanes).astype(np.uint32)
        words = np.frombuffer(data, "<u2", offset=header).astype(np.uint16, copy=False)
        out = np.empty((len(t.table_of), tokens), np.int32)
        used = decode_words(words, states, t.table_of, t.shifts, t.halves, t.slots, self.lanes, out)
        if used != len(words) or (states != LOWER).any():
            raise CodecError(WRONG_END)
        return out


def decode_blocks(
    coder: RansCoder, data: list[memoryview], tokens: list[int], backend: Backend | None, device: torch.device
) -> list[Tensor]:
    """Decode several blocks, in parallel.

    Args:
        coder: Tables and lanes of the codec.
        data: The bytes of every block.
        tokens: Its number of tokens.
        backend: What decodes (`kernels/rans/backend.py`); None chooses by the device. The integers do not depend on it.
        device: Where the integers are needed.

    Returns:
        Integers int32 [coefficients, tokens] of every block, on `device` from Triton, else on the CPU.

    Raises:
        CodecError: A block is corrupt.
    """
    if choose_backend(backend, device) == "triton":
        from eigencache.kernels.rans import triton  # Triton is optional

        blocks = triton.decode_blocks(data, tokens, coder.tables, coder.lanes, device)
        return [block[:, :count] for block, count in zip(blocks, tokens, strict=True)]
    return [torch.from_numpy(block) for block in parallel(lambda job: coder.decode(*job), zip(data, tokens, strict=True))]
