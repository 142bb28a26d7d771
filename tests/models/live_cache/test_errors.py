"""Unsupported uses of CompressedCache are refused with the reason, and a failed pass leaves its tokens unchanged."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache, GenerationConfig, PreTrainedModel

import eigencache
from eigencache.codec.live.packed_heads import PackedHeads
from eigencache.errors import CodecError, NonFiniteError, UnsupportedArchitectureError
from eigencache.models.live_cache.attention import attend
from eigencache.models.live_cache.cache import CompressedCache
from eigencache.models.live_cache.layer import CompressedLayer
from eigencache.models.live_cache.packed_blocks import PackedBlocks
from live_codecs import fine_codec, long_ids, long_model, random_layer, rotated_mean_codec

OUT_OF_MEMORY = (torch.OutOfMemoryError, RuntimeError, MemoryError)
GREEDY = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}


def distance(x: Tensor, y: Tensor) -> float:
    return float((x - y).square().mean().sqrt() / y.std())


@torch.no_grad()
def read(model: PreTrainedModel, cache: Any, ids: Tensor, **more: Any) -> Tensor:
    return model(input_ids=ids, past_key_values=cache, use_cache=True, **more).logits


# Caches of another kind


@pytest.fixture
def model() -> Iterator[PreTrainedModel]:
    found = long_model("llama")
    before = found.generation_config
    yield found
    found.generation_config = before


def by_name(_: PreTrainedModel, kind: str) -> tuple[tuple, dict]:
    return (), {"cache_implementation": kind}


def by_config(_: PreTrainedModel, kind: str) -> tuple[tuple, dict]:
    return (), {"generation_config": GenerationConfig(cache_implementation=kind)}


def by_place(_: PreTrainedModel, kind: str) -> tuple[tuple, dict]:
    return (GenerationConfig(cache_implementation=kind),), {}


def by_the_models_own(model: PreTrainedModel, kind: str) -> tuple[tuple, dict]:
    model.generation_config = GenerationConfig(cache_implementation=kind)
    return (), {}


WAYS = pytest.mark.parametrize("way", [by_name, by_config, by_place, by_the_models_own])


@pytest.mark.parametrize("kind", ["static", "offloaded", "offloaded_static", "quantized", "dynamic", "paged"])
@WAYS
def test_a_cache_of_another_kind_is_refused_by_name_before_anything_is_read(way: Callable, kind: str, model) -> None:
    calls, ids = [], long_ids(1, 20)
    hook = model.register_forward_pre_hook(lambda *_: calls.append(1))
    try:
        with eigencache.compressed(model, fine_codec(model)):
            calls.clear()
            args, given = way(model, kind)
            for more in ({}, {"past_key_values": CompressedCache(model, fine_codec(model))}):
                calls.clear()
                with pytest.raises(
                    CodecError, match=f"cache_implementation='{kind}' is not supported inside .*: leave it out"
                ):
                    model.generate(ids, *args, **GREEDY, **given, **more)
                assert not calls
    finally:
        hook.remove()


@WAYS
def test_a_cache_of_another_kind_may_be_asked_for_where_none_is_made_of_ours(way: Callable, model) -> None:
    ids, expected = long_ids(1, 20), model.generate(long_ids(1, 20), **GREEDY)
    with eigencache.compressed(model, fine_codec(model)):
        args, given = way(model, "hybrid")  # transformers ignores this old value
        assert type(model.generate(ids, *args, **GREEDY, **given, return_dict_in_generate=True).past_key_values) is (
            CompressedCache
        )
        args, given = way(model, "offloaded")
        assert torch.equal(model.generate(ids, *args, **GREEDY, **given | {"use_cache": False}), expected)
        if way is by_the_models_own:
            assert torch.equal(model.generate(ids, **GREEDY, cache_implementation=None), expected)


def test_a_generation_configuration_by_its_place_says_whether_there_is_a_cache(model) -> None:
    with eigencache.compressed(model, fine_codec(model)):
        config = GenerationConfig(use_cache=False, return_dict_in_generate=True, **GREEDY)
        assert model.generate(long_ids(1, 20), config).past_key_values is None


# Positions


@pytest.fixture(scope="module")
def biased() -> PreTrainedModel:
    """A model whose keys have large biases, so that the position at which a block is unpacked matters."""
    model = copy.deepcopy(long_model("qwen2"))
    generator = torch.Generator().manual_seed(0)
    for name, weight in model.named_parameters():
        if name.endswith("k_proj.bias"):
            weight.data += 6 * torch.randn(weight.shape, generator=generator)
    return model


def span(start: int, count: int) -> Tensor:
    return torch.arange(start, start + count)[None]


@pytest.mark.parametrize("then", [span(150, 3), span(0, 3), torch.tensor([[140, 141, 143]]), span(141, 3)])
def test_positions_that_jump_are_refused_where_they_matter(then: Tensor, biased) -> None:
    cache, ids = CompressedCache(biased, rotated_mean_codec(biased)), long_ids()
    read(biased, cache, ids[:, :140])
    found = next((int(p), 140 + i) for i, p in enumerate(then[0]) if int(p) != 140 + i)
    with pytest.raises(
        CodecError, match=f"sequence 0: the compressed cache expects position {found[1]} next, not {found[0]}: "
    ):
        read(biased, cache, ids[:, 140:143], position_ids=then)


def test_a_jump_within_the_first_piece_is_refused_too(biased) -> None:
    with pytest.raises(
        CodecError, match="sequence 0: the compressed cache expects position 70 next, not 0: pass consecutive position_ids"
    ):
        positions = torch.cat([span(0, 70), span(0, 70)], 1)
        read(biased, CompressedCache(biased, rotated_mean_codec(biased)), long_ids()[:, :140], position_ids=positions)


def test_the_row_whose_positions_jump_is_named(biased) -> None:
    cache, ids = CompressedCache(biased, rotated_mean_codec(biased)), long_ids()
    mask = torch.ones(2, 100, dtype=torch.int64)
    mask[1, :30] = 0
    read(biased, cache, ids[:, :100], attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp_min(0))
    with pytest.raises(CodecError, match="sequence 1: the compressed cache expects position 70 next, not 100"):
        read(biased, cache, ids[:, 100:101], attention_mask=torch.ones(2, 101), position_ids=span(100, 1).expand(2, 1))


def test_positions_that_jump_do_not_matter_where_no_mean_turns() -> None:
    model, ids = long_model("llama"), long_ids()
    logits = []
    for cache in (CompressedCache(model, fine_codec(model)), DynamicCache(config=model.config)):
        read(model, cache, ids[:, :140])
        logits.append(read(model, cache, ids[:, 140:143], position_ids=span(150, 3)))
    assert distance(logits[0], logits[1]) < 0.02


def as_plain(model: PreTrainedModel, steps: list[tuple[Tensor, dict]]) -> float:
    """Return the distance of the last logits between a compressed and a plain cache, read in the same steps."""
    last = []
    for cache in (CompressedCache(model, rotated_mean_codec(model)), DynamicCache(config=model.config)):
        for ids, more in steps:
            logits = read(model, cache, ids, **more)
        last.append(logits[:, -1])
    assert (
        all(layer.blocks or layer.dropped for layer in CompressedCache(model, rotated_mean_codec(model)).compressed_layers)
        or 1
    )
    return distance(last[0], last[1])


def test_a_text_may_begin_at_any_position(biased) -> None:
    ids = long_ids()
    steps = [
        (ids[:, at : at + count], {"position_ids": span(37 + at, count)})
        for at, count in ((0, 100), (100, 60), (160, 1), (161, 1))
    ]
    assert as_plain(biased, steps) < 0.05


@pytest.mark.parametrize("told", [True, False], ids=["positions", "slots"])
@pytest.mark.parametrize("pieces", [(150, 3, 1), (64, 86, 1), (40, 40, 70, 1)], ids=str)
def test_padding_may_be_longer_than_a_piece_and_positions_those_of_tokens_or_of_slots(pieces, told, biased) -> None:
    ids, steps, at = long_ids(3, 160), [], 0
    mask = (torch.arange(160)[None] >= torch.tensor([[0], [9], [70]])).long()
    positions = (mask.cumsum(1) - 1).clamp_min(0) if told else span(0, 160)
    for count in pieces:
        now = slice(at, at + count)
        steps.append((ids[:, now], {"attention_mask": mask[:, : at + count], "position_ids": positions[:, now]}))
        at += count
    assert as_plain(biased, steps) < 0.05


def test_after_a_crop_and_a_reset_positions_continue_and_begin_anew(biased) -> None:
    cache, ids = CompressedCache(biased, rotated_mean_codec(biased)), long_ids()
    read(biased, cache, ids[:, :150], position_ids=span(5, 150))
    cache.crop(-50)
    read(biased, cache, ids[:, :50], position_ids=span(105, 50))
    for empty in (lambda: cache.crop(-150), cache.reset):
        empty()
        read(biased, cache, ids[:, :150])
    with pytest.raises(CodecError, match="expects position 150 next, not 155"):
        read(biased, cache, ids[:, :1], position_ids=span(155, 1))


def test_rows_take_their_positions_with_them(biased) -> None:
    ids, mask = long_ids(3, 151), torch.arange(151)[None] >= torch.tensor([[0], [9], [70]])
    positions, rows, last = mask.cumsum(1) - 1, torch.tensor([2, 0, 2]), []
    for cache in (CompressedCache(biased, rotated_mean_codec(biased)), DynamicCache(config=biased.config)):
        read(biased, cache, ids[:, :150], attention_mask=mask[:, :150], position_ids=positions[:, :150].clamp_min(0))
        cache.reorder_cache(rows)
        then = {"attention_mask": mask[rows], "position_ids": positions[rows, 150:]}
        last.append(read(biased, cache, ids[rows, 150:], **then))
    assert distance(last[0], last[1]) < 0.05


@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 3}, {"prompt_lookup_num_tokens": 3}, {"prefill_chunk_size": 40}], ids=str
)
def test_no_way_of_decoding_jumps(options: dict, biased) -> None:
    rows = 1 if "prompt_lookup_num_tokens" in options else 3
    ids, answers = long_ids(rows, 140), []
    mask = (torch.arange(140)[None] >= torch.tensor([[0], [9], [70]])[:rows]).long()
    for cache in (CompressedCache(biased, rotated_mean_codec(biased)), DynamicCache(config=biased.config)):
        given = GREEDY | {"max_new_tokens": 12, "attention_mask": mask, "past_key_values": cache} | options
        answers.append(biased.generate(ids, **given))
    assert float((answers[0] == answers[1]).float().mean()) > 0.95  # near ties may be decided differently


def test_one_layer_looks_at_positions_for_all(biased) -> None:
    for codec, expected in ((rotated_mean_codec(biased), [True, False, False]), (fine_codec(biased), [False] * 3)):
        assert [layer.watches_positions for layer in CompressedCache(biased, codec).compressed_layers] == expected


@pytest.mark.parametrize("name", ["gemma3n_text", "gemma4_text"])
def test_layers_that_attend_to_what_another_caches_are_refused(name: str) -> None:
    model = long_model(name)
    with pytest.raises(
        UnsupportedArchitectureError, match=rf"{name}: layers \[.*3\] attend to the keys and values of other layers"
    ):
        CompressedCache(model, fine_codec(model))


# Out of memory


def states(layer: CompressedLayer) -> list[Tensor]:
    filled = [chunk.slot(slot) for chunk in layer.chunks for slot in (0, 1)]
    return [*layer.window, *layer.tensors()["sinks"], *(x.clone() for x in filled)]


def same(found: list[Tensor], expected: list[Tensor]) -> bool:
    return len(found) == len(expected) and all(map(torch.equal, found, expected))


def logits_of(layer: CompressedLayer) -> Tensor:
    query = torch.randn(2, 4, 1, 8, generator=torch.Generator().manual_seed(3))
    return attend(nn.Identity(), layer, query, *(x.float() for x in layer.window))


def drawn(tokens: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    keys, values = 4 * torch.randn(2, 2, 2, tokens, 8, generator=generator)
    return keys, values


class Short:
    """Makes one of the calls that allocate memory fail."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]) -> None:
        self.error, self.left = error, -1
        for owner, name in (
            (torch.Tensor, "clone"),
            (torch.Tensor, "new_empty"),
            (torch.Tensor, "to"),
            (torch, "cat"),
            (PackedHeads, "encode"),
        ):
            monkeypatch.setattr(owner, name, self._counted(getattr(owner, name)))

    def _counted(self, function: Callable) -> Callable:
        def counted(*args: Any, **given: Any) -> Any:
            self.left -= 1
            if self.left == -1:
                raise self.error("out of memory")
            return function(*args, **given)

        return counted

    def every(self, action: Callable[[], None], intact: Callable[[], None]) -> int:
        """Repeat `action` with each call failing in turn until none fails, and return the number of failures."""
        for failed in range(100):
            self.left = failed
            try:
                action()
            except self.error:
                self.left = -1
                intact()
            else:
                self.left = -1
                return failed
        raise AssertionError("it never went well")


def new_layer() -> CompressedLayer:
    layer = random_layer(2, 8)
    layer.wanted_sinks, layer.least_window = 3, 5
    return layer


@pytest.mark.parametrize("error", OUT_OF_MEMORY)
def test_a_layer_that_runs_out_of_memory_holds_what_it_held_and_may_try_again(error, monkeypatch) -> None:
    layer, whole = new_layer(), new_layer()
    short = Short(monkeypatch, error)
    for tokens in (
        1100,
        64,
        128,
        2,
        70,
    ):  # fills a chunk; adds one with room; fills it and adds another; packs nothing; packs one block
        keys, values = drawn(tokens)
        length = layer.get_seq_length()
        held = states(layer) if length else []

        def unchanged(length: int = length, held: list[Tensor] = held) -> None:
            assert (layer.get_seq_length(), layer.entered) == (length, 0)
            assert not length or same(states(layer), held)

        assert short.every(lambda: layer.update(keys, values), unchanged) >= 4  # noqa: B023 - called at once
        assert layer.entered == tokens
        before = logits_of(layer)

        def alike(length: int = length + tokens, before: Tensor = before) -> None:
            assert (layer.get_seq_length(), layer.entered) == (length, 0)
            torch.testing.assert_close(logits_of(layer), before, atol=1e-4, rtol=1e-4)

        assert short.every(layer.compact, alike) >= (0 if tokens == 2 else 6)
        whole.update(keys, values)
        whole.compact()
        assert same(states(layer), states(whole))
        assert layer.blocks == whole.blocks and layer.nbytes == whole.nbytes


@pytest.mark.parametrize("error", OUT_OF_MEMORY)
@pytest.mark.parametrize("count", [3, 90, 199])
def test_a_crop_that_runs_out_of_memory_takes_nothing(count: int, error, monkeypatch) -> None:
    layer, whole = new_layer(), new_layer()
    for one in (layer, whole):
        one.update(*drawn(200))
        one.compact()
    before, short = logits_of(layer), Short(monkeypatch, error)

    def alike() -> None:
        assert layer.get_seq_length() == 200
        torch.testing.assert_close(logits_of(layer), before, atol=1e-2, rtol=1e-2)  # unpacked tokens are in float16

    assert short.every(lambda: layer.crop(-count), alike) >= 2
    whole.crop(-count)
    assert same(states(layer), states(whole)) and layer.get_seq_length() == 200 - count


def test_choosing_rows_is_all_or_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = new_layer()
    layer.update(*drawn(200))
    layer.compact()
    held, get = states(layer), torch.Tensor.__getitem__
    for failing in range(4):  # two tensors of the window, two of the chunk
        left = [failing]

        def short(x: Tensor, at: Any, left: list[int] = left) -> Tensor:
            if isinstance(at, Tensor):
                left[0] -= 1
                if left[0] == -1:
                    raise torch.OutOfMemoryError("out of memory")
            return get(x, at)

        with monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, "__getitem__", short)
            with pytest.raises(torch.OutOfMemoryError):
                layer.select(torch.tensor([1, 1, 0]))
        assert same(states(layer), held)
    layer.select(torch.tensor([1, 1, 0]))
    assert len(layer.window[0]) == 3


# Numbers out of the range of 16 bits


@pytest.mark.parametrize("slot", [0, 1])
@pytest.mark.parametrize("value", [65520.0, -1e6])
def test_numbers_that_the_window_cannot_hold_are_refused_where_they_enter(value: float, slot: int) -> None:
    layer = random_layer(2, 8)
    layer.update(*drawn(10))
    layer.compact()
    held, new = states(layer), drawn(5)
    new[slot][1, 0, 3, 2] = value
    with pytest.raises(NonFiniteError) as error:
        layer.update(*new)
    found = f"layer 0: {('keys', 'values')[slot]} reach {abs(value):.3g}, more than the float16 maximum of 65504"
    assert str(error.value) == f"{found}: load the model with `dtype` bfloat16"
    assert layer.entered == 0 and same(states(layer), held)
    layer.update(*drawn(5))
    assert layer.get_seq_length() == 15


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_the_largest_numbers_that_fit_do(dtype: torch.dtype) -> None:
    layer, most = random_layer(2, 8), 65519.0 if dtype.itemsize > 2 else torch.finfo(dtype).max
    new = [x.to(dtype) for x in drawn(5)]
    new[0][0, 0, 0, 0] = most
    layer.update(*new)
    assert float(layer.window[0].max()) == min(most, torch.finfo(layer.window[0].dtype).max)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_was_no_number_before_is_named_as_it_leaves(bad: float) -> None:
    layer, new = random_layer(2, 8), drawn(70)
    new[1][0, 0, 0, 0] = bad
    layer.update(*new)
    with pytest.raises(NonFiniteError, match="layer 0: values contain NaN or infinite numbers"):
        layer.compact()


# Another batch


def test_a_cache_of_another_batch_is_refused_and_continues_with_its_own() -> None:
    model, ids = long_model("llama"), long_ids()
    logits = []
    for tried in (False, True):
        cache = CompressedCache(model, fine_codec(model))
        read(model, cache, ids[:, :100])
        if tried:
            with pytest.raises(CodecError, match="has 2 sequences, but 3 were passed: make a new cache"):
                read(model, cache, long_ids(batch=3)[:, :30])
        logits.append(read(model, cache, ids[:, 100:110]))
    assert torch.equal(logits[0], logits[1])


@pytest.mark.parametrize("error", [*OUT_OF_MEMORY, KeyboardInterrupt])
@pytest.mark.parametrize("where", ["window", "blocks", "model", "head"])
def test_a_pass_that_breaks_off_leaves_the_cache_as_it_was_and_may_be_tried_again(error, where: str, monkeypatch) -> None:
    """The pass fails when the second layer takes tokens or packs them, after its attention, or after all layers."""
    model, ids = long_model("llama"), long_ids(batch=2)
    owner, name, layer_idx = {
        "window": (CompressedLayer, "update", 1),
        "blocks": (PackedBlocks, "append", None),
        "model": (type(model.model.layers[1].mlp), "forward", None),
        "head": (type(model.lm_head), "forward", None),
    }[where]
    caches = [CompressedCache(model, fine_codec(model, sinks=3)) for _ in range(2)]
    for cache in caches:
        read(model, cache, ids[:, :120])
    lengths = [layer.get_seq_length() for layer in caches[0].compressed_layers]
    function, broken = getattr(owner, name), []

    def breaks(self: Any, *args: Any, **given: Any) -> Any:
        right = {
            "window": self,
            "blocks": caches[0].compressed_layers[1].packed,
            "model": model.model.layers[1].mlp,
            "head": model.lm_head,
        }[where]
        if self is right and not broken and layer_idx in (None, getattr(self, "layer_idx", None)):
            broken.append(1)
            raise error("out of memory")
        return function(self, *args, **given)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, breaks)
        with pytest.raises(error):
            read(model, caches[0], ids[:, 120:])
        if error is not KeyboardInterrupt:  # the next pass undoes it
            assert [layer.get_seq_length() for layer in caches[0].compressed_layers] == lengths
        again = read(model, caches[0], ids[:, 120:])
    assert broken and distance(again, read(model, caches[1], ids[:, 120:])) < 0.02  # packed tokens may have been unpacked
    assert [layer.get_seq_length() for layer in caches[0].compressed_layers] == [len(ids[0])] * len(lengths)
