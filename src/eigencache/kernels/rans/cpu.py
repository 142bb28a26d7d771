"""Integers ⇄ words by interleaved asymmetric numeral systems with static tables: exact for every 32-bit integer.

A block of integers [coefficients, tokens] is coded coefficient by coefficient. Token t is in lane t mod N; the N lanes,
each a 32-bit state, share one stream of 16-bit words, read in the order in which lanes run dry (Duda 2013; Giesen 2014
for the interleaving). A coefficient's table has 2^12 slots over −half … half and an escape. What is too wide for a table
keeps its lowest `shift` bits outside of it; what lies beyond a table is escaped: 32 bits, 8 at a time, through the same
states. Nothing is clipped. `encode_words` and `decode_words` are compiled; tests hold them against plain Python.
"""

import numba
import numpy as np

from eigencache.errors import CodecError

PRECISION = 12  # bits of a table
SLOTS = 1 << PRECISION
LOWER = 1 << 16  # least value of a state between words, and the value that every state begins with
MAX_LANES = 32
_STEP = 8  # bits of an escaped integer that go through a state at a time
_LOW = SLOTS >> _STEP
_SLACK = 1.08  # bits of integers over bits of a block, at most: see `require_block`
_compiled = numba.njit(cache=True, nogil=True, boundscheck=False)


def pack_slots(starts: np.ndarray, halves: np.ndarray) -> np.ndarray:
    """Per slot of every table [tables, 2^12] uint64: index | frequency << 16 | place within the frequency << 32.

    `starts` [tables, entries + 1]: first slot of each entry, the rest of a shorter table filled with 2^12.
    """
    slots = np.zeros((len(starts), SLOTS), np.uint64)
    for table, (edges, half) in enumerate(zip(starts, halves, strict=True)):
        edges = edges[: 2 * half + 3]
        frequency = np.diff(edges)
        index = np.repeat(np.arange(len(frequency)), frequency)
        place = np.arange(SLOTS) - edges[index]
        slots[table] = index.astype(np.uint64) | (frequency[index].astype(np.uint64) << 16) | (place.astype(np.uint64) << 32)
    return slots


def least_bits(table_of: np.ndarray, shifts: np.ndarray, halves: np.ndarray, starts: np.ndarray) -> float:
    """Return the fewest bits that one token can cost: Σ over coefficients of −log₂ of the largest share in their table."""
    least = np.zeros(len(halves))
    for table, (edges, half) in enumerate(zip(starts, halves, strict=True)):
        beside = np.append(np.full(2 * half + 1, shifts[table]), 32)  # bits outside of the table: lowest bits, or an escape
        least[table] = (PRECISION - np.log2(np.diff(edges[: 2 * half + 3])) + beside).min()
    return float(least[table_of].sum())


def require_block(nbytes: int, tokens: int, lanes: int, bits: float) -> None:
    """Check that a block can hold its tokens, before memory for them is allocated.

    A state of at least 16 f grows by at least 15/16 of −log₂(f / 2^12) when a number of frequency f is added, and cutting
    off a word of 16 bits loses at most log₂(17/16). w words and N states of 32 bits, which begin with 16, therefore hold
    at most 16/15 · (16.09 w + 16 N) bits, less than 1.08 times their size: no block that an encoder wrote is refused.

    Args:
        nbytes: size of the block.
        tokens: number of tokens that its header claims.
        lanes: number of interleaved states.
        bits: fewest bits that a token can cost, from `least_bits`.

    Raises:
        CodecError: the states are missing, the size is odd, or the tokens cannot fit.
    """
    states = 4 * lanes
    if nbytes < states or nbytes % 2:
        raise CodecError(f"corrupt block: expected at least {states} bytes and an even number, found {nbytes}")
    if tokens * bits > _SLACK * 8 * nbytes:
        fewest = int(tokens * bits / (_SLACK * 8))
        raise CodecError(f"corrupt block: {tokens} tokens take more than {fewest} bytes, found {nbytes}")


@_compiled
def _put(states, words, at, lane, frequency, start):
    """One more number of a lane. Without a branch: whether a word is full cannot be guessed. Frequencies are below 2^12."""
    x, f = states[lane], np.uint32(frequency)
    full = x >= f << np.uint32(32 - PRECISION)
    words[at - 1] = np.uint16(x & np.uint32(0xFFFF))
    at -= np.int64(full)
    x = x >> np.uint32(16) if full else x
    states[lane] = x + (x // f) * (np.uint32(SLOTS) - f) + np.uint32(start)
    return at


@_compiled
def _put_group(symbols, first, last, shift, half, edges, words, at, states):
    """`symbols` [tokens], from `first` up to `last`, of which some may be escaped or have bits outside of their table."""
    for step in range(3, -1, -1):  # escapes; the lowest bits are decoded first
        for t in range(last - 1, first - 1, -1):
            value = symbols[t]
            high = value >> shift
            if high > half or high < -half:
                part = (np.uint32(value) >> np.uint32(_STEP * step)) & np.uint32(255)
                at = _put(states, words, at, t - first, _LOW, np.int64(part) * _LOW)
    if shift:
        f = SLOTS >> shift
        for t in range(last - 1, first - 1, -1):
            value = symbols[t]
            high = value >> shift
            if -half <= high <= half:
                at = _put(states, words, at, t - first, f, np.int64(value & ((1 << shift) - 1)) * f)
    for t in range(last - 1, first - 1, -1):
        high = symbols[t] >> shift
        index = high + half if -half <= high <= half else 2 * half + 1
        at = _put(states, words, at, t - first, edges[index + 1] - edges[index], edges[index])
    return at


@_compiled
def encode_words(symbols, table_of, shifts, halves, starts, lanes, words, states):
    """Fill `words` from its end with `symbols` [coefficients, tokens] int32; gives where they begin.

    `states` [lanes] uint64 begin at `LOWER` and are left as the decoder has to begin. All is done in the opposite order
    of decoding. `words` needs room for 3 words per integer and one more.
    """
    width, tokens = symbols.shape
    at = words.shape[0]
    now = states.astype(np.uint32)
    for c in range(width - 1, -1, -1):
        row, table = symbols[c], table_of[c]
        shift, half, edges = shifts[table], halves[table], starts[table]
        plain = shift == 0
        for t in range(tokens):
            plain &= -half <= row[t] <= half
        for first in range((tokens - 1) // lanes * lanes, -1, -lanes):
            last = min(first + lanes, tokens)
            if plain:
                for lane in range(last - first - 1, -1, -1):
                    index = row[first + lane] + half
                    at = _put(now, words, at, lane, edges[index + 1] - edges[index], edges[index])
            else:
                at = _put_group(row, first, last, shift, half, edges, words, at, now)
    states[:] = now
    return at


@_compiled
def _read(x, lut):
    """A state without the number it begins with, and that number's index in its table."""
    entry = lut[x & np.uint32(SLOTS - 1)]
    frequency, place = np.uint32((entry >> np.uint64(16)) & np.uint64(0xFFFF)), np.uint32(entry >> np.uint64(32))
    return frequency * (x >> np.uint32(PRECISION)) + place, np.int32(entry & np.uint64(0xFFFF))


@_compiled
def _renormalized(x, words, at):
    """The state with a word more where it needs one, and where the next word is; beyond the end zeros are read."""
    if x < np.uint32(LOWER):
        word = words[at] if at < words.shape[0] else np.uint16(0)
        return (x << np.uint32(16)) | np.uint32(word), at + 1
    return x, at


@_compiled
def decode_words(words, states, table_of, shifts, halves, slots, lanes, out):
    """Decode into `out` [coefficients, tokens] int32; gives how many words that took, which may be more than there are.

    `states` [lanes] uint32 end at `LOWER`, all of them, if and only if words and states are what an encoder made.
    """
    width, tokens = out.shape
    at = 0
    mask, precision, low_frequency = np.uint32(SLOTS - 1), np.uint32(PRECISION), np.uint32(_LOW)
    parts = np.zeros(lanes, np.uint32)
    marks = np.zeros(lanes, np.bool_)
    now = states.copy()
    for c in range(width):
        row, table = out[c], table_of[c]
        shift, half = shifts[table], halves[table]
        lut = slots[table]
        for first in range(0, tokens, lanes):
            count = min(lanes, tokens - first)
            escapes = 0
            if at + count <= words.shape[0]:  # without a branch: whether a state runs dry cannot be guessed
                for lane in range(count):
                    x, index = _read(now[lane], lut)
                    dry = x < np.uint32(LOWER)
                    more = (x << np.uint32(16)) | np.uint32(words[at])
                    now[lane] = more if dry else x
                    at += np.int64(dry)
                    row[first + lane] = index - half
                    escapes += index > 2 * half
            else:
                for lane in range(count):
                    x, index = _read(now[lane], lut)
                    now[lane], at = _renormalized(x, words, at)
                    row[first + lane] = index - half
                    escapes += index > 2 * half
            if escapes:
                for lane in range(count):
                    marks[lane] = row[first + lane] > half
            if shift:
                f = np.uint32(SLOTS >> shift)
                for lane in range(count):
                    if not (escapes and marks[lane]):
                        x = now[lane]
                        low = (x & mask) // f
                        now[lane], at = _renormalized(f * (x >> precision) + (x & mask) - low * f, words, at)
                        row[first + lane] = (row[first + lane] << shift) + np.int32(low)
            if escapes:
                parts[:] = 0
                for step in range(4):
                    for lane in range(count):
                        if marks[lane]:
                            x = now[lane]
                            part = (x & mask) // low_frequency
                            x = low_frequency * (x >> precision) + (x & mask) - part * low_frequency
                            now[lane], at = _renormalized(x, words, at)
                            parts[lane] |= part << np.uint32(_STEP * step)
                for lane in range(count):
                    if marks[lane]:
                        row[first + lane] = np.int32(parts[lane])
    states[:] = now
    return at
