"""Interleaved rANS against plain Python, on random tables, widths, lanes and integers of any size."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eigencache.kernels.rans.cpu import LOWER, PRECISION, SLOTS, decode_words, encode_words, pack_slots
from rans_cases import random_tables


def plain_decode(words, states, table_of, shifts, halves, starts, lanes, tokens):
    """Decode by the description of the format, one lane at a time, in Python integers."""
    words, states, out = list(map(int, words)), list(map(int, states)), np.zeros((len(table_of), tokens), np.int64)

    def advance(lane, frequency, start):
        x = states[lane]
        x = frequency * (x >> PRECISION) + (x % SLOTS) - start
        if x < LOWER:
            x = (x << 16) | words.pop(0)
        states[lane] = x

    for c, table in enumerate(table_of):
        shift, half, edges = int(shifts[table]), int(halves[table]), list(map(int, starts[table]))
        for first in range(0, tokens, lanes):
            chosen = range(min(lanes, tokens - first))
            for lane in chosen:
                slot = states[lane] % SLOTS
                index = max(i for i in range(2 * half + 2) if edges[i] <= slot)
                advance(lane, edges[index + 1] - edges[index], edges[index])
                out[c, first + lane] = index - half
            escaped = [lane for lane in chosen if out[c, first + lane] > half]
            if shift:
                width = SLOTS >> shift
                for lane in (lane for lane in chosen if lane not in escaped):
                    low = states[lane] % SLOTS // width
                    advance(lane, width, low * width)
                    out[c, first + lane] = (out[c, first + lane] << shift) + low
            parts = dict.fromkeys(escaped, 0)
            for step in range(4):
                for lane in escaped:
                    part = states[lane] % SLOTS // 16
                    advance(lane, 16, part * 16)
                    parts[lane] |= part << 8 * step
            for lane, value in parts.items():
                out[c, first + lane] = value - (1 << 32 if value >= 1 << 31 else 0)
    return out, states, words


def encoded(symbols, table_of, shifts, halves, starts, lanes):
    words = np.empty(3 * symbols.size + lanes, np.uint16)
    states = np.full(lanes, LOWER, np.uint64)
    at = encode_words(symbols, table_of, shifts, halves, starts, lanes, words, states)
    return words[at:].copy(), states.astype(np.uint32)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([1, 3, 4, 8, 16, 32]), st.integers(1, 70), st.integers(0, 6))
def test_what_is_decoded_is_what_was_encoded_as_plain_python_reads_it(seed, lanes, tokens, width):
    rng = np.random.default_rng(seed)
    shifts, halves, starts = random_tables(rng, 3)
    table_of = rng.integers(0, 3, width).astype(np.int32)
    symbols = rng.laplace(scale=rng.choice([0.3, 20, 4000]), size=(width, tokens)).astype(np.int32)
    symbols[rng.random(symbols.shape) < 0.02] = rng.choice([2**31 - 1, -(2**31), 2**30, -1, 0])
    words, states = encoded(symbols, table_of, shifts, halves, starts, lanes)
    out = np.full_like(symbols, 77)
    after = states.copy()
    used = decode_words(words, after, table_of, shifts, halves, pack_slots(starts, halves), lanes, out)
    plain, plain_states, left = plain_decode(words, states, table_of, shifts, halves, starts, lanes, tokens)
    assert (out == symbols).all() and (plain == symbols).all()
    assert used == len(words) and not left and (after == LOWER).all() and set(plain_states) <= {LOWER}


def test_the_length_is_near_that_of_the_tables(rng=np.random.default_rng(0)):  # noqa: B008 - fixed
    shifts, halves = np.zeros(1, np.int32), np.full(1, 3, np.int32)
    starts = np.array([[0, 1, 10, 200, 3800, 4000, 4090, 4095, SLOTS]], np.int32)
    share = np.diff(starts[0]) / SLOTS
    symbols = rng.choice(np.arange(-3, 4), p=share[:-1] / share[:-1].sum(), size=(200, 128)).astype(np.int32)
    words, _ = encoded(symbols, np.zeros(200, np.int32), shifts, halves, starts, 8)
    ideal = -np.log2(share[symbols + 3]).sum() / 8
    assert ideal - 16 <= 2 * len(words) <= ideal * 1.001 + 16


@pytest.mark.parametrize("harm", ["short", "other"])
def test_wrong_words_never_read_beyond_the_end_and_never_end_well(harm):
    rng = np.random.default_rng(1)
    shifts, halves, starts = random_tables(rng, 1)
    table_of, symbols = np.zeros(20, np.int32), rng.integers(-5, 5, (20, 33)).astype(np.int32)
    words, states = encoded(symbols, table_of, shifts, halves, starts, 4)
    words = words[:3] if harm == "short" else rng.integers(0, 2**16, len(words)).astype(np.uint16)
    used = decode_words(words, states, table_of, shifts, halves, pack_slots(starts, halves), 4, np.empty_like(symbols))
    assert used != len(words) or (states != LOWER).any()
