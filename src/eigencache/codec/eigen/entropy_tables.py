"""Static entropy tables: coefficients of similar spread share one, fitted at calibration and stored with the codec.

A table has 2^12 slots over −half … half and an escape (THEORY 7). For large integers a table covers value >> shift and the
lowest bits are coded raw: within so small a part of the distribution they are nearly uniform.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from eigencache.kernels.rans.cpu import PRECISION, SLOTS, least_bits, pack_slots

MAX_HALF = 127
_WIDE = 24.0  # largest mean magnitude of a table, in units of 2^shift
_SMOOTH = 0.02  # counts added to every entry
_ESCAPE = 0.5


@dataclass(frozen=True, eq=False)
class EntropyTables:
    """The table of every coefficient [coefficients], and shift, half and edges [2 · MAX_HALF + 3] of every table."""

    table_of: np.ndarray  # int32
    shifts: np.ndarray  # int32
    halves: np.ndarray  # int32
    starts: np.ndarray  # int32: first slot of every entry, then 2^12

    @cached_property
    def slots(self) -> np.ndarray:
        """The decoder's look-up table."""
        return pack_slots(self.starts, self.halves)

    @property
    def least_bits(self) -> float:
        """Fewest bits that the integers of one token can cost."""
        return self._least_bits

    @cached_property
    def _least_bits(self) -> float:
        return least_bits(self.table_of, self.shifts, self.halves, self.starts)

    def variances(self) -> np.ndarray:
        """Return the mean square of the integers of every coefficient [coefficients] by its table, without escapes.

        The one slot that every entry has at least is not counted: it would dominate rare entries.
        """
        by_table = []
        for shift, half, edges in zip(self.shifts, self.halves, self.starts, strict=True):
            values = np.arange(-half, half + 1, dtype=np.float64) * 2.0**shift
            weights = np.diff(edges[: 2 * half + 2]) - 1
            by_table.append(weights @ values**2 / max(1, weights.sum()))
        return np.maximum(np.array(by_table), 1 / SLOTS)[self.table_of]

    def bits(self, symbols: np.ndarray) -> float:
        """Return the ideal code length, Σ −log₂ of the shares, of `symbols` [coefficients, tokens] in bits."""
        return self.bits_and_escapes(symbols)[0]

    def bits_and_escapes(self, symbols: np.ndarray) -> tuple[float, int]:
        """Return what `bits` returns, and how many of the symbols are beyond their table and cost 32 bits more."""
        total, escapes = 0.0, 0
        for table, (shift, half, edges) in enumerate(zip(self.shifts, self.halves, self.starts, strict=True)):
            counts = _counts(symbols[self.table_of == table], int(shift), int(half))
            bits = PRECISION - np.log2(np.diff(edges[: 2 * half + 3])) + np.append(np.full(2 * half + 1, shift), 32)
            total += float(counts @ bits)
            escapes += int(counts[-1])
        return total, escapes


def fit_tables(symbols: np.ndarray, table_of: np.ndarray) -> EntropyTables:
    """Fit tables to integers.

    Args:
        symbols: Integers [coefficients, n] of the calibration set.
        table_of: Table of every coefficient [coefficients], numbered from 0 without gaps.
    """
    shifts, halves, starts = [], [], []
    for table in range(int(table_of.max(initial=-1)) + 1):
        values = symbols[table_of == table].ravel()
        wide = np.log2(max(np.abs(values).mean(), 1e-9) / _WIDE)
        shift = int(np.clip(np.ceil(wide), 0, PRECISION))
        half = int(min(MAX_HALF, np.abs(values >> shift).max(initial=0) + 1))
        counts = _counts(values, shift, half) + np.append(np.full(2 * half + 1, _SMOOTH), _ESCAPE)
        shifts.append(shift)
        halves.append(half)
        starts.append(np.pad(edges_of(counts), (0, 2 * (MAX_HALF - half)), mode="edge"))
    return EntropyTables(
        table_of.astype(np.int32),
        np.array(shifts, np.int32),
        np.array(halves, np.int32),
        np.array(starts, np.int32).reshape(len(shifts), 2 * MAX_HALF + 3),
    )


def _counts(values: np.ndarray, shift: int, half: int) -> np.ndarray:
    """Count how often each entry of a table occurs, the escape last."""
    high = (values >> shift).ravel()
    entries = np.where((high < -half) | (high > half), 2 * half + 1, high + half)
    return np.bincount(entries, minlength=2 * half + 2)


def edges_of(counts: np.ndarray) -> np.ndarray:
    """Return slots in proportion to counts, at least one each, as edges [entries + 1] from 0 to 2^12.

    Slots left over by rounding go where they save the most bits; missing ones are taken where they cost the fewest.
    """
    share = counts / counts.sum()
    slots = np.maximum(1, np.floor(share * SLOTS)).astype(np.int64)
    while slots.sum() > SLOTS:
        cost = np.where(slots > 1, share * np.log2(slots / np.maximum(slots - 1, 1)), np.inf)
        slots[cost.argmin()] -= 1
    while slots.sum() < SLOTS:
        slots[(share * np.log2((slots + 1) / slots)).argmax()] += 1
    return np.append(0, slots.cumsum())


def fault_of(tables: EntropyTables) -> str | None:
    """Return why tables that were read from a file cannot be used, or None."""
    if not len(tables.halves) or _beyond(tables.table_of, 0, len(tables.halves) - 1):
        return "a coefficient names a table that does not exist"
    if _beyond(tables.halves, 1, MAX_HALF) or _beyond(tables.shifts, 0, PRECISION):
        return "a table's width is out of range"
    for edges, half in zip(tables.starts, tables.halves, strict=True):
        used = edges[: 2 * half + 3].astype(np.int64)  # in 32 bits a difference could overflow
        if used[0] != 0 or used[-1] != SLOTS or (np.diff(used) < 1).any() or (edges[2 * half + 3 :] != SLOTS).any():
            return "a table does not fill its slots"
    return None


def _beyond(numbers: np.ndarray, low: int, high: int) -> bool:
    return bool(((numbers < low) | (numbers > high)).any())
