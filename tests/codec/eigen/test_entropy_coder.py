"""Static tables and the coder that uses them: exact, near the ideal length, and their faults are found."""

import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eigencache.codec.eigen.entropy_coder import RansCoder
from eigencache.codec.eigen.entropy_tables import MAX_HALF, EntropyTables, edges_of, fault_of, fit_tables
from eigencache.errors import CodecError
from eigencache.kernels.rans.cpu import SLOTS


def laplacian(scales, tokens, seed=0):
    rng = np.random.default_rng(seed)
    return np.rint(rng.laplace(size=(len(scales), tokens)) * np.asarray(scales)[:, None]).astype(np.int32)


SCALES = np.geomspace(60, 0.08, 400)  # from 7 bits to a tenth of one
TABLE_OF = np.arange(400) // 10


def ideal_bits(fitted, symbols):
    """Code length of the static model itself: shares of every class, of what it was fitted on, without slots."""
    total = 0.0
    for table in range(TABLE_OF.max() + 1):
        values, counts = np.unique(fitted[table == TABLE_OF], return_counts=True)
        share = dict(zip(values.tolist(), (counts / counts.sum()).tolist(), strict=True))
        total -= sum(np.log2(share.get(v, 2.0**-32)) for v in symbols[table == TABLE_OF].ravel().tolist())
    return total


def test_a_block_of_128_tokens_is_within_3_percent_of_the_ideal_static_model():
    fitted, block = laplacian(SCALES, 8192), laplacian(SCALES, 128, seed=1)
    data = RansCoder(fit_tables(fitted, TABLE_OF), 16).encode(block)
    assert ideal_bits(fitted, block) / 8 < len(data) * 1.001
    assert len(data) <= 1.03 * ideal_bits(fitted, block) / 8


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 200), st.sampled_from([4, 8, 16, 32]))
def test_any_integers_come_back_whatever_the_tables_were_fitted_on(seed, tokens, lanes):
    rng = np.random.default_rng(seed)
    coder = RansCoder(fit_tables(laplacian([3, 0.2, 900], 500), np.array([0, 1, 2])), lanes)
    symbols = laplacian([30, 3, 5000], tokens, seed)
    symbols[rng.random(symbols.shape) < 0.05] = rng.integers(-(2**31), 2**31)
    assert (coder.decode(coder.encode(symbols), tokens) == symbols).all()


def test_bits_are_what_the_words_take():
    tables, symbols = fit_tables(laplacian(SCALES, 4096), TABLE_OF), laplacian(SCALES, 1024, seed=2)
    symbols[5, 7], symbols[300, 9] = 2**30, -500  # escapes
    data = RansCoder(tables, 4).encode(symbols)
    assert 8 * len(data) == pytest.approx(tables.bits(symbols), rel=1e-3)


def test_integers_beyond_their_table_are_counted():
    tables, symbols = fit_tables(laplacian([3, 0.2, 900], 4000), np.arange(3)), laplacian([3, 0.2, 900], 500, seed=3)
    before = tables.bits_and_escapes(symbols)[1]
    symbols[0, 7], symbols[1, 9], symbols[2, 11] = 2**20, -3000, 2**30
    bits, escapes = tables.bits_and_escapes(symbols)
    assert before <= 2
    assert escapes == before + 3
    assert bits == tables.bits(symbols)


def test_variances_are_about_those_of_what_was_fitted():
    symbols = laplacian([9, 0.4, 900], 20_000)
    found = fit_tables(symbols, np.array([2, 0, 1])).variances()
    np.testing.assert_allclose(found, (symbols.astype(float) ** 2).mean(1), rtol=0.35)  # tails are rare


def test_edges_give_every_entry_a_slot_and_the_rest_by_share():
    edges = edges_of(np.array([1e-9, 900.0, 100.0, 1e-9, 0.5]))
    assert edges[0] == 0 and edges[-1] == SLOTS and (np.diff(edges) >= 1).all()
    assert np.diff(edges)[1] / np.diff(edges)[2] == pytest.approx(9, rel=0.02)
    crowded = edges_of(np.append(1e12, np.full(2 * MAX_HALF, 1e-6)))  # more than rounding down leaves
    assert crowded[-1] == SLOTS and (np.diff(crowded) >= 1).all()


def test_no_coefficients_are_coded_as_nothing():
    coder = RansCoder(fit_tables(np.zeros((0, 50), np.int32), np.zeros(0, int)), 8)
    assert coder.decode(coder.encode(np.zeros((0, 9), np.int32)), 9).shape == (0, 9)


@pytest.mark.parametrize("harm", ["cut", "odd", "other", "longer"])
def test_bytes_that_no_block_has_are_refused(harm):
    coder = RansCoder(fit_tables(laplacian(SCALES, 512), TABLE_OF), 8)
    data = coder.encode(laplacian(SCALES, 64, seed=3))
    harmed = {"cut": data[:20], "odd": data[:-1], "other": data[:40] + bytes(100) + data[140:], "longer": data + b"\0\0"}
    with pytest.raises(CodecError):
        coder.decode(harmed[harm], 64)


def certain(width: int, frequency: int) -> EntropyTables:
    """A table whose integer 0 has a share of `frequency` / 2^12, the most that one can have being 4,093."""
    edges = np.array([0, 1, 1 + frequency, 2 + frequency, SLOTS])
    starts = np.pad(edges, (0, 2 * MAX_HALF - 2), mode="edge")[None].astype(np.int32)
    return EntropyTables(np.zeros(width, np.int32), np.zeros(1, np.int32), np.ones(1, np.int32), starts)


def test_the_fewest_bits_of_a_token_are_those_of_its_likeliest_integers():
    assert certain(50, 4093).least_bits == pytest.approx(50 * np.log2(4096 / 4093))
    assert certain(50, 8).least_bits == 50 * 9, "an escape has most slots and takes 32 bits more"
    tables = fit_tables(laplacian(SCALES, 512), TABLE_OF)
    slots = zip(tables.shifts, tables.halves, tables.starts, strict=True)
    likeliest = np.array([np.diff(edges[: 2 * half + 2]).argmax() - half << shift for shift, half, edges in slots])
    assert tables.least_bits == pytest.approx(tables.bits(likeliest[TABLE_OF][:, None]))


@pytest.mark.parametrize("tokens", [1, 31, 32, 500, 4000])
@pytest.mark.parametrize("frequency", [1500, 2048, 3000, 4000, 4093])
@pytest.mark.parametrize("lanes", [1, 8, 32])
def test_the_smallest_blocks_that_an_encoder_writes_are_read(tokens, frequency, lanes):
    coder = RansCoder(certain(40, frequency), lanes)
    data = coder.encode(np.zeros((40, tokens), np.int32))
    assert (coder.decode(data, tokens) == 0).all()


def test_the_cap_is_near_what_a_block_takes():
    coder = RansCoder(certain(40, 3000), 8)
    data = coder.encode(np.zeros((40, 4000), np.int32))
    with pytest.raises(CodecError, match=rf"corrupt block: 4400 tokens take more than .* bytes, found {len(data)}"):
        coder.decode(data, 4400)


def test_tokens_that_a_block_only_claims_take_no_memory():
    coder = RansCoder(fit_tables(laplacian(SCALES, 512), TABLE_OF), 8)
    data = RansCoder(coder.tables, 8).encode(np.zeros((400, 0), np.int32))  # states alone
    _ = coder.tables.slots
    tracemalloc.start()
    try:
        with pytest.raises(CodecError, match=r"corrupt block: 65535 tokens take more than .* bytes, found 32"):
            coder.decode(data, 65_535)
        assert tracemalloc.get_traced_memory()[1] < 2**20  # 105 MB would hold the claim
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "harm",
    [
        {"table_of": np.array([0, 5], np.int32)},
        {"table_of": np.array([-1, 0], np.int32)},
        {"shifts": np.array([13], np.int32)},
        {"halves": np.array([0], np.int32)},
        {"starts": np.zeros((1, 2 * MAX_HALF + 3), np.int32)},
        {"starts": np.full((1, 2 * MAX_HALF + 3), SLOTS, np.int32)},
    ],
)
def test_tables_that_cannot_be_coded_with_are_named(harm):
    tables = fit_tables(laplacian([2, 2], 100), np.array([0, 0]))
    assert fault_of(tables) is None
    assert fault_of(replace(tables, **harm))
