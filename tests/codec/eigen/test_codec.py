"""`eigen` end to end on planted caches: integers exact, bytes as counted, any stretch alone, nothing silently wrong."""

from collections.abc import Iterator
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from eigencache.codec.base import EncodedBytes
from eigencache.codec.eigen.codec import SinksAndWindow
from eigencache.codec.eigen.container import Container, read, write
from eigencache.codec.eigen.container_header import ContainerHeader
from eigencache.codec.eigen.entropy_coder import RansCoder
from eigencache.codec.eigen.entropy_tables import fit_tables
from eigencache.codec.eigen.missing_layers import fill_missing
from eigencache.codec.eigen.quantizer import DeadZone
from eigencache.codec.eigen.raw_tokens import raw_nbytes
from eigencache.codec.eigen.token_digits import token_digits
from eigencache.codec.eigen.token_predictor import TokenPredictor
from eigencache.codec.eigen.transform import Stage, StagedTransform
from eigencache.codec.layout import by_layer
from eigencache.errors import CodecError, ContainerError, ForeignContainerError
from staged_codecs import (
    COLUMNS,
    DIM,
    FINE,
    LAYERS,
    LAYOUT,
    MEAN,
    STEP,
    VOCABULARY,
    WIDTH,
    assert_same,
    base,
    cache,
    codec,
    header,
    integers,
    predictor,
    quantized,
    stretch,
    transform,
    vectors,
)


@pytest.mark.parametrize("text", [False, True])
@pytest.mark.parametrize("lanes", [4, 32])
def test_what_is_decoded_is_what_the_integers_say(text: bool, lanes: int) -> None:
    one = codec(text, kept=SinksAndWindow(0, 0, 8), lanes=lanes)
    given_ = cache(50, 9, 2, text=text)
    decoded = one.decode(one.encode(given_, 9))
    expected = quantized(one, LAYOUT.vectors(given_, 9))
    assert_same(decoded, by_layer(LAYOUT.slots(expected, 9), torch.float32))
    assert float((LAYOUT.vectors(decoded, 9) - vectors(50, 2, text=text)).abs().max()) < 4 * STEP


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 1, 3), (3, 0, 2, 1)])
def test_parts_may_be_in_any_order(order: tuple[int, ...]) -> None:
    layout = replace(LAYOUT, parts=tuple(LAYOUT.parts[i] for i in order))
    one, x = codec(layout=layout, kept=SinksAndWindow(0, 0, 8)), vectors(30)
    given_ = by_layer(layout.slots(x, 5), torch.float32)
    decoded = one.decode(one.encode(given_, 5))
    assert_same(decoded, by_layer(layout.slots(quantized(one, x), 5), torch.float32), atol=1e-3)


@settings(max_examples=60, deadline=None)
@given(
    tokens=st.integers(1, 40),
    sinks=st.integers(0, 6),
    window=st.integers(0, 12),
    block=st.integers(1, 20),
    start=st.integers(0, 9),
    text=st.booleans(),
    bits=st.sampled_from([8, 16]),
    data=st.data(),
)
def test_any_stretch_of_any_cache_comes_back(tokens, sinks, window, block, start, text, bits, data) -> None:
    one = codec(text, kept=SinksAndWindow(sinks, window, bits), block=block)
    given_ = cache(tokens, start, text=text)
    encoded, x = one.encode(given_, start), LAYOUT.vectors(given_, start)
    assert (encoded.start, encoded.tokens, encoded.nbytes) == (start, tokens, len(encoded.rows[0]))
    whole = one.decode(encoded)
    lost = 0.02 if bits == 16 else float(x.abs().max()) / 200
    first = min(tokens, max(0, sinks - start))
    last = max(first, tokens - window)
    assert (header(encoded).sinks, header(encoded).window) == (first, tokens - last)
    assert_same(stretch(whole, slice(0, first)), stretch(given_, slice(0, first)), atol=lost)
    assert_same(stretch(whole, slice(last, None)), stretch(given_, slice(last, None)), atol=lost)
    coded = by_layer(LAYOUT.slots(quantized(one, x[:, first:last]), start + first), torch.float32)
    assert_same(stretch(whole, slice(first, last)), coded)
    a = data.draw(st.integers(0, tokens - 1))
    b = data.draw(st.integers(a + 1, tokens))
    assert_same(one.decode(encoded, slice(a, b)), stretch(whole, slice(a, b)))


@pytest.mark.parametrize("text", [False, True])
def test_every_slice_is_that_of_the_whole(text: bool) -> None:
    one = codec(text, kept=SinksAndWindow(3, 5, 8), block=7)
    encoded = one.encode(cache(31, 0, 2, text=text), 0)
    whole = one.decode(encoded)
    for a in range(31):
        for b in range(a + 1, 32):
            assert_same(one.decode(encoded, slice(a, b)), stretch(whole, slice(a, b)))
    for tokens in (slice(-4, None), slice(None, -9), slice(5, 5000)):
        assert_same(one.decode(encoded, tokens), stretch(whole, tokens))


@pytest.mark.parametrize("tokens", [slice(None), slice(2, 4), slice(1, 29), slice(28, 31)])
def test_a_layer_comes_before_the_next_stage_is_decoded(tokens: slice, monkeypatch: pytest.MonkeyPatch) -> None:
    one = codec(True, kept=SinksAndWindow(3, 5, 8), block=7)
    encoded = one.encode(cache(31, text=True), 0)
    whole, decoded, stages = one.decode(encoded, tokens), [], StagedTransform.dequantized

    def counted(*args: Any) -> Iterator[tuple[Stage, Tensor]]:
        for stage, z in stages(*args):
            decoded.append(stage)
            yield stage, z

    monkeypatch.setattr(StagedTransform, "dequantized", counted)
    layers = one.decode_layers(encoded, tokens)
    assert not decoded
    for count, (i, both) in enumerate(layers):
        assert i == list(whole)[count] and all(map(torch.equal, both, whole[i]))
        assert len(decoded) in (0, count + 1)  # 0: tokens that are stored raw need no stage
    assert count + 1 == len(whole)
    with pytest.raises(CodecError, match="non-empty contiguous slice"):
        one.decode_layers(encoded, slice(3, 3))


def test_a_slice_touches_no_block_but_its_own() -> None:
    one = codec(kept=SinksAndWindow(3, 5, 8), block=7)
    whole = one.encode(cache(31), 0)
    row, damaged = whole.rows[0], bytearray(whole.rows[0])
    sections = [len(s) for s in read(row).sections]
    at = len(row) - sum(sections) + sum(sections[:2])  # in the second block: tokens 10 … 16
    damaged[at] ^= 1
    hurt = EncodedBytes((bytes(damaged),), 0, 31)
    for tokens in (slice(0, 10), slice(17, 31)):
        assert_same(one.decode(hurt, tokens), one.decode(whole, tokens))
    for tokens in (slice(9, 11), slice(None)):
        with pytest.raises(ContainerError, match="section 2 has checksum"):
            one.decode(hurt, tokens)


@pytest.mark.parametrize("tokens", [slice(3, 3), slice(50, 60), slice(0, 9, 2), slice(None, None, -1)])
def test_what_is_no_stretch_of_neighbors_is_refused(tokens: slice) -> None:
    with pytest.raises(CodecError, match="non-empty contiguous slice"):
        codec().decode(codec().encode(cache(20), 0), tokens)


def test_rows_are_containers_of_their_own_and_can_be_chosen() -> None:
    one, given_ = codec(), cache(40, batch=3)
    encoded = one.encode(given_, 0)
    for row in range(3):
        alone = one.encode({i: (k[row : row + 1], v[row : row + 1]) for i, (k, v) in given_.items()}, 0)
        assert alone.rows == encoded.rows[row : row + 1]
    chosen = one.decode(encoded.select(torch.tensor([2, 0, 2])))
    assert_same(chosen, {i: (k[[2, 0, 2]], v[[2, 0, 2]]) for i, (k, v) in one.decode(encoded).items()})


def test_rows_of_unlike_stretches_are_refused_together() -> None:
    one = codec()
    rows = [one.encode(cache(20, start), start).rows[0] for start in (0, 1)]
    with pytest.raises(CodecError, match="rows hold different tokens"):
        one.decode(EncodedBytes(tuple(rows), 0, 20))


@pytest.mark.parametrize(("start", "sinks"), [(0, 4), (1, 3), (3, 1), (4, 0), (900, 0)])
def test_only_positions_below_the_number_of_sinks_are_sinks(start: int, sinks: int) -> None:
    encoded = codec().encode(cache(30, start), start)
    assert (header(encoded).start, header(encoded).sinks, header(encoded).window) == (start, sinks, 6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("bits", [8, 16])
def test_kept_tokens_lose_rounding_alone_in_the_dtype_of_the_model(dtype: torch.dtype, bits: int) -> None:
    one = codec(kept=SinksAndWindow(4, 6, bits), dtype=dtype)
    given_ = {i: (k.to(dtype), v.to(dtype)) for i, (k, v) in cache(30).items()}
    decoded = one.decode(one.encode(given_, 0))
    for layer_idx, both in given_.items():
        for x, y in zip(both, decoded[layer_idx], strict=True):
            assert y.dtype == dtype
            for kept in (slice(0, 4), slice(24, 30)):
                if bits == 16:
                    assert torch.equal(
                        y[:, :, kept], x[:, :, kept].half().float() if dtype == torch.float32 else x[:, :, kept]
                    )
                else:
                    error = (y[:, :, kept].float() - x[:, :, kept].float()).abs()
                    step = x[:, :, kept].float().abs().amax(-1, keepdim=True) / 127
                    assert bool((error <= 0.51 * step + (x[:, :, kept].float().abs() / 250)).all())


@pytest.mark.parametrize("tokens", [1, 3, 4, 5, 9, 10, 11, 26, 27])
def test_bytes_are_those_of_the_arithmetic(tokens: int) -> None:
    one = codec()
    encoded = one.encode(cache(tokens), 0)
    first = min(tokens, 4)
    last = max(first, tokens - 6)
    bits = one.tables.bits(integers(one, vectors(tokens)[:, first:last])[0][0].T.numpy())
    predicted = one.nbytes_of(tokens, bits / max(1, last - first))
    if last == first:
        assert encoded.nbytes == predicted
    blocks = -(-(last - first) // 16)
    assert predicted - 2 * 4 * blocks - 1 <= encoded.nbytes <= predicted + 1  # a state holds up to 2 bytes of what is coded


def test_kept_bytes_are_exact_and_a_container_names_what_it_keeps() -> None:
    for bits in (8, 16):
        container = read(codec(kept=SinksAndWindow(4, 6, bits)).encode(cache(30), 0).rows[0])
        heads = [DIM] * (WIDTH // DIM)
        assert len(container.sections[0]) == raw_nbytes(4, heads, bits)
        assert len(container.sections[-1]) == raw_nbytes(6, heads, bits)
        assert (container.kept_bits, container.block, container.block_count) == (bits, 16, 2)


def test_layers_that_hold_the_last_tokens_only_come_back_as_they_were() -> None:
    one, whole = codec(text=True, kept=SinksAndWindow(4, 6, 8), block=8), cache(40, text=True)
    sliding = whole | {0: (whole[0][0][:, :, 15:], whole[0][1][:, :, 15:])}
    encoded = one.encode(sliding, 0)
    assert header(encoded).absent == ((0, 15),)
    decoded = one.decode(encoded)
    assert decoded[0][0].shape[2] == decoded[0][1].shape[2] == 25 and decoded[1][0].shape[2] == 40
    full = one.decode(one.encode(whole, 0))
    assert_same({0: decoded[0]}, {0: tuple(x[:, :, 15:] for x in full[0])}, atol=3 * STEP)
    for a, b in [(0, 15), (3, 20), (14, 15), (15, 16), (30, 40)]:
        part = one.decode(encoded, slice(a, b))
        assert part[1][0].shape[2] == b - a and part[0][0].shape[2] == max(0, b - max(a, 15))
        held = (slice(max(a, 15) - 15, max(0, b - 15)), slice(a, b))
        assert_same(part, {i: tuple(x[:, :, held[i]] for x in decoded[i]) for i in decoded})


@pytest.mark.parametrize("text", [False, True])
def test_layers_are_filled_with_the_prior_of_what_the_tables_were_fitted_to(
    text: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, priors = codec(text), []

    def filled(z: Tensor, first: Tensor | None, *others) -> Tensor:
        priors.append(others[-1])
        assert (first is None) != text
        return fill_missing(z, first, *others)

    monkeypatch.setattr("eigencache.codec.eigen.codec.fill_missing", filled)
    whole = cache(40)
    one.encode(whole | {0: (whole[0][0][:, :, 15:], whole[0][1][:, :, 15:])}, 0)
    q = integers(base(), vectors(500, seed=7))[0][0].double()  # what the tables of the coefficients were fitted to
    variances = q.square().mean(0).view(-1, 8).mean(1).repeat_interleave(8)
    assert len(priors) == 1
    torch.testing.assert_close(priors[0].double(), 12 * variances, rtol=0.1, atol=0.02)


@pytest.mark.parametrize("text", [False, True])
def test_values_far_out_of_range_survive_through_escapes(text: bool) -> None:
    one = codec(text, kept=SinksAndWindow(0, 0, 8))
    x = MEAN + 1e4 * (vectors(20) - MEAN)
    encoded = one.encode(by_layer(LAYOUT.slots(x, 0), torch.float32), 0)
    decoded = LAYOUT.vectors(one.decode(encoded), 0)
    assert float((decoded - x).norm() / x.norm()) < 1e-5
    q, first = integers(one, x)
    z = one.transform.dequantize(q, STEP, one.quantizer, first)
    assert float((one.transform.weighed(x - MEAN) - z).abs().max()) < 2 * STEP
    torch.testing.assert_close(decoded, quantized(one, x), rtol=1e-5, atol=2 * STEP)
    assert encoded.nbytes > 2 * one.encode(cache(20, text=text), 0).nbytes


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("token", [1, 12, 29])  # a sink, coded, in the window
@pytest.mark.parametrize("slot", [0, 1])
def test_what_is_no_number_is_refused(bad: float, token: int, slot: int) -> None:
    harmed = cache(30)
    harmed[1][slot][0, 1, token, 3] = bad
    with pytest.raises(CodecError, match="NaN or infinite"):
        codec().encode(harmed, 0)


def test_what_is_no_number_is_refused_where_nothing_is_coded() -> None:
    first, second = transform().stages
    stages = first, replace(second, fine=second.fine[:0], coarse=second.coarse[:0], scale=second.scale[:0])
    q = DeadZone(*(x[:COLUMNS] for x in vars(base().quantizer).values()))
    tables = fit_tables(np.zeros((COLUMNS, 9), np.int32), np.zeros(COLUMNS, int))
    one = codec(transform=replace(transform(), stages=stages), quantizer=q, tables=tables)
    harmed = cache(30)
    assert one.decode(one.encode(harmed, 0))[1][1].isfinite().all()
    harmed[1][1][0, 1, 12, 3] = torch.nan
    with pytest.raises(CodecError, match="NaN"):
        one.encode(harmed, 0)


def test_a_container_of_another_codec_is_refused() -> None:
    encoded = codec().encode(cache(20), 0)
    with pytest.raises(ForeignContainerError):
        codec(step=STEP * 1.0001).decode(encoded)
    assert_same(codec(name="the same under another name").decode(encoded), codec().decode(encoded))


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"block": 8}, "block is 8, this codec writes 16"),
        ({"block": 65_535}, "block is 65535, this codec writes 16"),
        ({"kept_bits": 16}, "kept_bits is 16, this codec writes 8"),
        ({"start": 2}, "sinks is 4, this codec writes 2"),
    ],
)
def test_a_header_that_this_codec_does_not_write_is_refused_before_anything_is_made(changed: dict, said: str) -> None:
    one = codec()
    container = read(one.encode(cache(30), 0).rows[0])
    header = replace(ContainerHeader(**{f.name: getattr(container, f.name) for f in fields(ContainerHeader)}), **changed)
    with pytest.raises(CodecError, match=said):
        one._require_own(header)


def test_a_block_of_another_size_in_a_whole_container_is_refused() -> None:
    one = codec()
    given = cache(30)
    foreign = codec(block=8).encode(given, 0).rows[0]
    forged = write(replace(read(foreign), codec_sha256=one.sha256))
    with pytest.raises(CodecError, match="block is 8, this codec"):
        one.decode(EncodedBytes((forged,), 0, 30))


def test_a_cache_of_another_model_is_refused() -> None:
    whole = cache(20)
    for other in ({0: whole[0]}, whole | {2: whole[0]}, {i: tuple(x[:, :1] for x in both) for i, both in whole.items()}):
        with pytest.raises(CodecError, match="fitted on another model"):
            codec().encode(other, 0)


def test_moved_it_is_the_same_codec() -> None:
    one = codec(text=True)
    moved = one.to("cpu")
    assert moved.sha256 == replace(moved).sha256 == one.sha256 and moved.nbytes == one.nbytes
    assert moved.encode(cache(20, text=True), 0).rows == one.encode(cache(20, text=True), 0).rows


def test_what_is_held_once_is_all_tensors_and_tables() -> None:
    one = base(text=True)
    t, tables = one.transform, one.tables
    rows = LAYERS * COLUMNS * (2 * FINE + (COLUMNS - FINE)) + 4 * WIDTH
    held = 4 * WIDTH + rows + (COLUMNS**2 + 8 * COLUMNS) + 2 * WIDTH * DIM
    coder = 4 * (len(tables.table_of) + 2 * len(tables.shifts) + tables.starts.size)
    assert sum(x.nbytes for x in t.tensors()) == held
    assert one.nbytes == held + 16 * WIDTH + coder + sum(x.nbytes for x in predictor().tensors())
    assert base().nbytes < one.nbytes


def test_text_saves_bits_and_a_wrong_guess_costs_them_but_never_correctness() -> None:
    class Wrong(TokenPredictor):
        def find(self, x: Tensor) -> Tensor:
            return (super().find(x) + 1 + torch.arange(x.shape[1])) % VOCABULARY

    one, given_, x = codec(text=True, kept=SinksAndWindow(0, 0, 8)), cache(64, text=True), vectors(64, text=True)
    wrong = replace(one, text=Wrong(*(getattr(predictor(), field.name) for field in fields(TokenPredictor))))
    right_row, wrong_row = (c.encode(given_, 0) for c in (one, wrong))
    assert one.sha256 == wrong.sha256  # ranks are said, so that any decoder follows
    assert right_row.nbytes < 0.8 * wrong_row.nbytes
    assert right_row.nbytes < 0.8 * codec(kept=SinksAndWindow(0, 0, 8)).encode(given_, 0).nbytes
    for row in (right_row, wrong_row):
        assert float((LAYOUT.vectors(one.decode(row), 0) - x).abs().max()) < 4 * STEP


def test_a_digit_beyond_the_vocabulary_is_damage() -> None:
    one = codec(text=True, kept=SinksAndWindow(0, 0, 8))
    container = read(one.encode(cache(10, text=True), 0).rows[0])
    for digit in (VOCABULARY, -VOCABULARY, 2**30):
        symbols = np.zeros((WIDTH + token_digits(VOCABULARY).count, 10), np.int32)
        symbols[0, 3] = digit
        harmed = Container(**vars(container) | {"sections": (RansCoder(one.tables, one.lanes).encode(symbols),)})
        with pytest.raises(CodecError, match="a token that the vocabulary does not have"):
            one.decode(EncodedBytes((write(harmed),), 0, 10))


def test_threads_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    one, given_ = codec(), cache(60, batch=3)
    alone = one.encode(given_, 0)
    decoded = one.decode(alone)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert one.encode(given_, 0).rows == alone.rows
    assert_same(one.decode(alone), decoded, atol=0)
