"""Code integers into words by interleaved rANS (asymmetric numeral systems) with static tables, losslessly for any int32.

A block of integers [coefficients, tokens] is coded coefficient by coefficient. Token t belongs to lane t mod N. Each of the
N lanes has a 32-bit state; all lanes share one stream of 16-bit words, which are read in the order in which states fall
below 2^16 (Duda 2013; Giesen 2014 for the interleaving). The table of a coefficient divides 2^12 slots among the integers
−half … half and an escape symbol. A coefficient too wide for a table stores the lowest `shift` bits of its integers outside
of the table. An integer beyond the table is escaped: its 32 bits follow, 8 at a time, through the same states.
"""

import numba
import numpy as np

from eigencache.errors import CodecError

PRECISION = 12  # bits of a table
SLOTS = 1 << PRECISION
LOWER = 1 << 16  # smallest value of a state between words, and the initial value of every state
MAX_LANES = 32
WRONG_END = "corrupt block: decoding does not end where an encoder starts; the block is damaged or belongs to another codec"
_STEP = 8  # bits of an escaped integer that are coded at a time
_LOW = SLOTS >> _STEP  # frequency of each of these 8-bit parts
_SLACK = 1.08  # largest ratio of the bits of integers to the bits of their block: see `require_block`
_compiled = numba.njit(cache=True, nogil=True, boundscheck=False)


def pack_slots(starts: np.ndarray, halves: np.ndarray) -> np.ndarray:
    """Return the decoding entries of every slot: index | frequency << 16 | place within the frequency << 32.

    Args:
        starts: [tables, entries + 1] first slot of each entry; shorter tables are padded with 2^12.
        halves: [tables] largest integer of each table.

    Returns:
        Entries uint64 [tables, 2^12].
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
    """Return the fewest bits that one token can cost, summed over coefficients.

    Args:
        table_of: [coefficients] table of each coefficient.
        shifts: [tables] bits outside of each table.
        halves: [tables] largest integer of each table.
        starts: [tables, entries + 1] first slot of each entry.
    """
    least = np.zeros(len(halves))
    for table, (edges, half) in enumerate(zip(starts, halves, strict=True)):
        outside = np.append(np.full(2 * half + 1, shifts[table]), 32)  # bits outside of the table: lowest bits, or an escape
        least[table] = (PRECISION - np.log2(np.diff(edges[: 2 * half + 3])) + outside).min()
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
def _put(states, words, position, lane, frequency, start):
    """Push a symbol onto a lane; return where the words begin. Branch-free: whether a word is emitted is unpredictable."""
    x, f = states[lane], np.uint32(frequency)
    full = x >= f << np.uint32(32 - PRECISION)
    words[position - 1] = np.uint16(x & np.uint32(0xFFFF))
    position -= np.int64(full)
    x = x >> np.uint32(16) if full else x
    states[lane] = x + (x // f) * (np.uint32(SLOTS) - f) + np.uint32(start)
    return position


@_compiled
def _put_group(symbols, first, last, shift, half, edges, words, position, states):
    """Push `symbols` first … last, of which some may be escaped or have bits outside of their table."""
    for step in range(3, -1, -1):  # escapes; the lowest bits are decoded first
        for t in range(last - 1, first - 1, -1):
            value = symbols[t]
            high = value >> shift
            if high > half or high < -half:
                part = (np.uint32(value) >> np.uint32(_STEP * step)) & np.uint32(255)
                position = _put(states, words, position, t - first, _LOW, np.int64(part) * _LOW)
    if shift:
        f = SLOTS >> shift
        for t in range(last - 1, first - 1, -1):
            value = symbols[t]
            high = value >> shift
            if -half <= high <= half:
                position = _put(states, words, position, t - first, f, np.int64(value & ((1 << shift) - 1)) * f)
    for t in range(last - 1, first - 1, -1):
        high = symbols[t] >> shift
        index = high + half if -half <= high <= half else 2 * half + 1
        position = _put(states, words, position, t - first, edges[index + 1] - edges[index], edges[index])
    return position


@_compiled
def encode_words(symbols, table_of, shifts, halves, starts, lanes, words, states):
    """Encode integers in the reverse order of decoding, and fill `words` from its end.

    Args:
        symbols: int32 [coefficients, tokens] integers.
        table_of: [coefficients] table of each coefficient.
        shifts: [tables] bits outside of each table.
        halves: [tables] largest integer of each table.
        starts: [tables, entries + 1] first slot of each entry.
        lanes: number of states.
        words: output uint16 with room for 3 words per integer and one more.
        states: uint64 [lanes], initially `LOWER`; on return, the initial states of the decoder.

    Returns:
        The index in `words` at which the encoded words begin.
    """
    width, tokens = symbols.shape
    position = words.shape[0]
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
                    position = _put(now, words, position, lane, edges[index + 1] - edges[index], edges[index])
            else:
                position = _put_group(row, first, last, shift, half, edges, words, position, now)
    states[:] = now
    return position


@_compiled
def _read(x, lut):
    """Pop a symbol from a state: return the state, which may need a word, and the symbol's index in its table."""
    entry = lut[x & np.uint32(SLOTS - 1)]
    frequency, place = np.uint32((entry >> np.uint64(16)) & np.uint64(0xFFFF)), np.uint32(entry >> np.uint64(32))
    return frequency * (x >> np.uint32(PRECISION)) + place, np.int32(entry & np.uint64(0xFFFF))


@_compiled
def _renormalized(x, words, position):
    """Return the state, with one more word where it needs one, and the next word; words beyond the end are zeros."""
    if x < np.uint32(LOWER):
        word = words[position] if position < words.shape[0] else np.uint16(0)
        return (x << np.uint32(16)) | np.uint32(word), position + 1
    return x, position


@_compiled
def decode_words(words, states, table_of, shifts, halves, slots, lanes, out):
    """Decode integers into `out`.

    Args:
        words: uint16 words of the block.
        states: uint32 [lanes] initial states; on return, the final ones. If an encoder wrote words and states, all of them
            end at `LOWER` and all words are read.
        table_of: [coefficients] table of each coefficient.
        shifts: [tables] bits outside of each table.
        halves: [tables] largest integer of each table.
        slots: of `pack_slots`.
        lanes: number of states.
        out: output int32 [coefficients, tokens].

    Returns:
        The number of words read, which may exceed the number of words of a corrupt block.
    """
    width, tokens = out.shape
    position = 0
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
            if position + count <= words.shape[0]:  # branch-free: it is unpredictable whether a state needs a word
                for lane in range(count):
                    x, index = _read(now[lane], lut)
                    dry = x < np.uint32(LOWER)
                    more = (x << np.uint32(16)) | np.uint32(words[position])
                    now[lane] = more if dry else x
                    position += np.int64(dry)
                    row[first + lane] = index - half
                    escapes += index > 2 * half
            else:
                for lane in range(count):
                    x, index = _read(now[lane], lut)
                    now[lane], position = _renormalized(x, words, position)
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
                        now[lane], position = _renormalized(f * (x >> precision) + (x & mask) - low * f, words, position)
                        row[first + lane] = (row[first + lane] << shift) + np.int32(low)
            if escapes:
                parts[:] = 0
                for step in range(4):
                    for lane in range(count):
                        if marks[lane]:
                            x = now[lane]
                            part = (x & mask) // low_frequency
                            x = low_frequency * (x >> precision) + (x & mask) - part * low_frequency
                            now[lane], position = _renormalized(x, words, position)
                            parts[lane] |= part << np.uint32(_STEP * step)
                for lane in range(count):
                    if marks[lane]:
                        row[first + lane] = np.int32(parts[lane])
    states[:] = now
    return position
