"""The first tokens of every row stay exact in a compressed cache, wherever padding ends, and all others are packed."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from eigencache.codec.sinks_and_window import FIRST_EXACT
from eigencache.kernels.packed.format import BLOCK
from eigencache.models.live_cache.attention import attend
from eigencache.models.live_cache.cache import CompressedCache
from eigencache.models.live_cache.layer import CompressedLayer
from eigencache.models.live_cache.rows import Rows
from live_codecs import fine_codec, long_ids, long_model, random_layer, unpacked_cache

PADS = (0, 2, 9, 70, 149)  # padding of prompts of 150 tokens; one row has a single token
NAMES = ["gpt2", "llama", "gemma2", "gemma3_text", "deepseek_v2"]


def drawn(batch: int, tokens: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    keys, values = 2 * torch.randn(2, batch, 2, tokens, 8, generator=torch.Generator().manual_seed(seed))
    return keys, values


def layer_with(sinks: int, sliding_window: int | None = None) -> CompressedLayer:
    layer = random_layer(2, 8)
    layer.wanted_sinks = sinks
    layer.sliding_window, layer.is_sliding = sliding_window, sliding_window is not None
    return layer


def add(layer: CompressedLayer, states: tuple[Tensor, Tensor], first: Tensor) -> None:
    """Do what one pass does: add tokens, find where rows begin, pack blocks."""
    past = layer.get_seq_length()
    layer.update(*states)
    layer.place(torch.arange(past, past + states[0].shape[2])[None] >= first[:, None], None)
    layer.compact()


def first_tokens(states: tuple[Tensor, Tensor], row: int, first: int, count: int) -> list[Tensor]:
    return [x[row, :, first : first + count].half() for x in states]


def holds_exactly(layer: CompressedLayer, row: int, tokens: list[Tensor]) -> bool:
    """Return whether keys and values of each of these tokens are stored together in 16 bits in this row."""
    held = [torch.cat(pair, 2)[row] for pair in zip(layer.tensors()["sinks"], layer.window, strict=True)]
    same = [(x[:, :, None] == one[:, None]).all(-1).all(0) for one, x in zip(tokens, held, strict=True)]
    return bool((same[0] & same[1]).any(0).all())


# A sink whose key and value are small


@pytest.mark.parametrize(("sinks", "low", "high"), [(FIRST_EXACT, 0, 0.01), (0, 0.5, 100)])
def test_a_small_sink_that_everything_attends_to_is_exact_by_default_and_ruins_the_output_when_packed(
    sinks: int, low: float, high: float
) -> None:
    """As in real models, all keys point far away from the queries except that of the sink, which is small."""
    keys, values = drawn(1, 200)
    keys[..., 0] = -4 + 0.3 * keys[..., 0].tanh()
    for x in (keys, values):
        x[:, :, 0] = 0.1 * values[:, :, 0]  # a tenth of the size of others
    layer, query = layer_with(sinks), torch.zeros(1, 4, 1, 8)
    query[..., 0] = 10 * 8**0.5
    add_fitted(layer, keys, values)
    assert layer.blocks == (200 - sinks) // BLOCK
    exact = nn.functional.scaled_dot_product_attention(query, keys, values, enable_gqa=True)
    given = values[:, :, 0].repeat_interleave(2, 1)[:, :, None]
    assert float((exact - given).norm() / given.norm()) < 0.001  # everything attends to the sink
    found = attend(nn.Identity(), layer, query, *(x.float() for x in layer.window)).transpose(1, 2)
    assert low <= float((found - exact).norm() / exact.norm()) <= high


def add_fitted(layer: CompressedLayer, keys: Tensor, values: Tensor) -> None:
    """Do what one pass does, with 4-bit means and steps fitted to all tokens but the first."""
    heads = []
    for packed, x in zip(layer.heads, (keys, values), strict=True):
        mean, step = x[0, :, 1:].mean(1), x[0, :, 1:].std(1) / 3
        encoder, decoder = torch.diag_embed(1 / step), torch.diag_embed(step)
        heads.append(replace(packed, encoder=encoder, decoder=decoder, mean=mean))
    layer.heads = heads[0], heads[1]
    add(layer, (keys, values), torch.zeros(1, dtype=torch.int64))


# Padding


def test_a_short_row_leaves_the_others_packed_and_every_rows_first_tokens_are_exact() -> None:
    first, states = torch.tensor(PADS), drawn(len(PADS), 150)
    layer, unpadded = layer_with(4), layer_with(4)
    add(layer, states, first)
    add(unpadded, states, torch.zeros_like(first))
    assert layer.blocks == unpadded.blocks == (150 - 4) // BLOCK
    assert layer.nbytes == unpadded.nbytes and layer.get_seq_length() == 150
    for row, count in enumerate(PADS):
        assert holds_exactly(layer, row, first_tokens(states, row, count, 4))


def test_a_rows_first_tokens_may_come_one_by_one_and_once_more_after_a_crop() -> None:
    first, states = torch.tensor(PADS), drawn(len(PADS), 300)
    layer = layer_with(4)
    for start, stop in ((0, 147), (147, 150), (150, 151), (151, 300)):
        add(layer, (states[0][:, :, start:stop], states[1][:, :, start:stop]), first)
    layer.crop(-150)  # of the last row, the first token remains
    layer.crop(-2)  # not even that one remains
    again = drawn(len(PADS), 152, seed=1)
    add(layer, again, first)
    whole = [torch.cat([x[:, :, :148], y], 2) for x, y in zip(states, again, strict=True)]
    assert layer.get_seq_length() == 300 and layer.blocks == (300 - 4) // BLOCK
    for row, count in enumerate(PADS):
        assert holds_exactly(layer, row, first_tokens((whole[0], whole[1]), row, count, 4))


def test_nothing_new_changes_nothing() -> None:
    layer, states = layer_with(4), drawn(2, 2)
    for tokens in (0, 2, 0):
        add(layer, (states[0][:, :, :tokens], states[1][:, :, :tokens]), torch.zeros(2, dtype=torch.int64))
        layer.compact()
    assert (layer.get_seq_length(), layer.led, layer.window_count) == (2, 2, 0)
    assert holds_exactly(layer, 1, first_tokens(states, 1, 0, 2))


def test_rows_that_move_take_their_first_tokens_with_them_and_rows_that_stay_are_not_copied() -> None:
    first, states = torch.tensor(PADS), drawn(len(PADS), 150)
    layer = layer_with(4)
    add(layer, states, first)
    before = [x.data_ptr() for tensors in layer.tensors().values() for x in tensors]
    layer.reorder_cache(torch.arange(len(PADS)))
    assert [x.data_ptr() for tensors in layer.tensors().values() for x in tensors] == before
    layer.reorder_cache(torch.tensor([3, 4, 0, 3, 1]))
    for row, source in enumerate((3, 4, 0, 3, 1)):
        assert holds_exactly(layer, row, first_tokens(states, source, PADS[source], 4))


def test_a_sliding_window_forgets_first_tokens_when_no_row_sees_its_own_any_more() -> None:
    first = torch.tensor([0, 149])
    layer, states = layer_with(4, sliding_window=100), drawn(2, 1000)
    for stop in range(50, 1001, 50):
        add(layer, (states[0][:, :, stop - 50 : stop], states[1][:, :, stop - 50 : stop]), first)
        assert layer.get_seq_length() == stop
        seen = stop > 149 and stop - 100 <= 153
        assert not seen or holds_exactly(layer, 1, first_tokens(states, 1, 149, min(4, stop - 149)))
    assert layer.dropped and layer.sinks is None


# In a model


@torch.no_grad()
def padded(model: PreTrainedModel, cache: CompressedCache, ids: Tensor, pieces: tuple[int, ...], first: Tensor) -> Tensor:
    """Return the logits of rows with left padding that are read in pieces."""
    mask, found, start = (torch.arange(ids.shape[1])[None] >= first[:, None]).long(), [], 0
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    for length in pieces:
        now = slice(start, start + length)
        start += length
        more = {"attention_mask": mask[:, :start], "position_ids": positions[:, now]}
        found.append(model(input_ids=ids[:, now], past_key_values=cache, use_cache=True, **more).logits)
        for layer in cache.compressed_layers:
            layer.compact()
    return torch.cat(found, 1)[mask.bool()]


@pytest.mark.slow
@pytest.mark.versions
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("pieces", [(150, 1, 1, 48), (40, 40, 70, 3, 47)], ids=str)
def test_padded_rows_are_read_as_plain_attention_reads_the_same_bytes_unpacked(name: str, pieces: tuple[int, ...]) -> None:
    model, ids, first = long_model(name), long_ids(4, 200), torch.tensor([0, 2, 70, 149])
    codec = fine_codec(model, sinks=4)
    unpacked, cache = unpacked_cache(model, codec), CompressedCache(model, codec)
    for layer in unpacked.compressed_layers:
        layer.rows = Rows(first, -first)  # plain attention does not call `place`
    expected, found = (padded(model, one, ids, pieces, first) for one in (unpacked, cache))
    assert all(layer.blocks or layer.dropped for layer in cache.compressed_layers)
    assert float((found - expected).square().mean().sqrt() / expected.std()) < 3e-3


def test_a_padded_row_without_a_mask_sees_its_first_tokens_once() -> None:
    layer, (keys, values) = layer_with(4), drawn(2, 200)
    add(layer, (keys, values), torch.tensor([0, 70]))
    query = torch.randn(2, 4, 1, 8, generator=torch.Generator().manual_seed(3))
    window = [x.float() for x in layer.window]
    assert layer.sinks is not None and layer.rows is not None
    shown = torch.ones(2, 1, 1, 200, dtype=torch.bool)
    explicit = attend(nn.Identity(), layer, query, window[0], window[1], shown)
    torch.testing.assert_close(attend(nn.Identity(), layer, query, window[0], window[1]), explicit)
    numbers = torch.zeros(2, 1, 1, 200)
    torch.testing.assert_close(attend(nn.Identity(), layer, query, window[0], window[1], numbers), explicit)
