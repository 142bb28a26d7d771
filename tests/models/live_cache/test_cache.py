"""CompressedCache works like a plain cache in every architecture and decoding strategy, and reports the bytes it has."""

import copy

import pytest
import torch
from transformers import DynamicCache

from eigencache.codec.live.codec import LiveCodec
from eigencache.errors import CodecError, NonFiniteError, UnsupportedArchitectureError
from eigencache.kernels.packed.format import BLOCK
from eigencache.models.live_cache.attention import require_compressed_attention
from eigencache.models.live_cache.cache import CompressedCache
from live_codecs import LONG, fine_codec, long_ids, long_model, unpacked_cache, with_means
from tiny_models import NO_CACHE_NAMES, NO_RETURNED_CACHE_NAMES, available

pytestmark = pytest.mark.slow

NAMES = [name for name in available() if name not in NO_CACHE_NAMES + NO_RETURNED_CACHE_NAMES]
USUAL = ("gpt2", "llama", "qwen2", "gemma2", "gemma3_text", "deepseek_v2")
PIECES = (100, 30, 1, 1, 66, 1, 9)


@torch.no_grad()
def in_pieces(model, cache, ids: torch.Tensor, pieces=PIECES, **more) -> torch.Tensor:
    logits, start = [], 0
    for length in pieces:
        if "attention_mask" in more:
            more["attention_mask"] = torch.ones_like(ids[:, : start + length]) if start else more["attention_mask"]
        piece = ids[:, start : start + length]
        logits.append(model(input_ids=piece, past_key_values=cache, use_cache=True, **more).logits)
        start += length
        for layer in getattr(cache, "compressed_layers", ()):
            layer.compact()
    return torch.cat(logits, 1)


def distance(x: torch.Tensor, y: torch.Tensor) -> float:
    return float((x - y).square().mean().sqrt() / y.std())


# Every architecture


def agree(name: str, codec: LiveCodec, ids: torch.Tensor) -> CompressedCache:
    """Assert that logits equal those of plain attention over the same bytes unpacked, and return the compressed cache."""
    model = long_model(name)
    expected = in_pieces(model, unpacked_cache(model, codec), ids)
    cache = CompressedCache(model, codec)
    found = in_pieces(model, cache, ids)
    assert distance(found, expected) < 3e-3  # numbers of the window may be rounded the other way
    assert cache.get_seq_length() == sum(PIECES)
    return cache


@pytest.mark.parametrize("name", NAMES)
def test_attention_reads_the_packed_past_in_every_architecture_that_is_not_refused(name: str) -> None:
    model, ids = long_model(name), long_ids()
    try:
        require_compressed_attention(model)
        codec = fine_codec(model)
        CompressedCache(model, codec)
    except UnsupportedArchitectureError as error:
        assert any(words in str(error) for words in ("keys and values, or MLA", "cannot be replaced", "of other layers")), (
            error
        )
        assert name not in USUAL
        return
    cache = agree(name, codec, ids)
    assert all(layer.blocks or layer.dropped for layer in cache.compressed_layers)


@pytest.mark.parametrize("name", USUAL)
@pytest.mark.parametrize(("sinks", "window", "bundled"), [(4, 0, False), (0, 20, True), (70, 64, False)])
def test_sinks_windows_and_shared_bases_are_read_too(name: str, sinks: int, window: int, bundled: bool) -> None:
    codec = fine_codec(long_model(name), sinks=sinks, window=window, bundled=bundled)
    for layer in agree(name, codec, long_ids()).compressed_layers:
        assert layer.led == (0 if layer.dropped else sinks) and window <= layer.window_count < window + BLOCK


@pytest.mark.parametrize("name", ["qwen2", "deepseek_v2"])
def test_keys_with_a_large_mean_are_read_too(name: str) -> None:
    """The rotated mean is one of keys, or of the rotary key of MLA."""
    agree(name, with_means(long_model(name)), long_ids())


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "deepseek_v2"])
def test_pieces_of_any_length_give_the_same(name: str) -> None:
    model, ids = long_model(name), long_ids(batch=1)
    codec = fine_codec(model, sinks=3)
    one = in_pieces(model, CompressedCache(model, codec), ids, (64, 144))[:, 64:]
    for pieces in ((64, 80, 64), (64, *([12] * 12)), (64, 1, 1, 1, 141)):
        assert distance(in_pieces(model, CompressedCache(model, codec), ids, pieces)[:, 64:], one) < 0.04


def test_queries_that_wait_for_others_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = long_model("llama"), long_ids()
    codec = fine_codec(model)
    whole = in_pieces(model, CompressedCache(model, codec), ids)
    monkeypatch.setattr("eigencache.models.live_cache.attention._LOGITS", 2 * 4 * 150 * 5)
    assert distance(in_pieces(model, CompressedCache(model, codec), ids), whole) < 1e-5


# Ways of decoding


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "deepseek_v2"])
def test_left_padding_changes_no_row(name: str) -> None:
    model, ids = long_model(name), long_ids(batch=3, length=150)
    codec, pads = fine_codec(model, sinks=2), (0, 9, 70)
    mask = torch.ones_like(ids)
    for row, count in enumerate(pads):
        mask[row, :count] = 0
    cache, new = CompressedCache(model, codec), long_ids(batch=3, length=4, seed=8)
    with torch.no_grad():
        positions = (mask.cumsum(-1) - 1).clamp_min(0)
        model(input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True)
        mask = torch.cat([mask, torch.ones_like(new)], 1)
        together = model(
            input_ids=new,
            attention_mask=mask,
            position_ids=(mask.cumsum(-1) - 1)[:, -4:],
            past_key_values=cache,
            use_cache=True,
        ).logits
    for row, count in enumerate(pads):
        alone = in_pieces(
            model, DynamicCache(config=model.config), torch.cat([ids, new], 1)[row : row + 1, count:], (150 - count, 4)
        )
        assert distance(together[row], alone[0, -4:]) < 0.03


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3},
        {"num_beams": 2, "num_return_sequences": 2},
        {"prompt_lookup_num_tokens": 3},
        {"do_sample": True, "top_k": 5},
        {"prefill_chunk_size": 40},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["llama", "deepseek_v2"])
def test_every_way_of_decoding_gives_the_tokens_of_the_plain_cache(name: str, options: dict) -> None:
    model = long_model(name)
    ids = long_ids(batch=1 if "prompt_lookup_num_tokens" in options else 2, length=140)
    answers = []
    for cache in (DynamicCache(config=model.config), CompressedCache(model, fine_codec(model))):
        torch.manual_seed(0)
        given = {"do_sample": False, "max_new_tokens": 12, "pad_token_id": 0} | options
        answers.append(model.generate(ids, attention_mask=torch.ones_like(ids), past_key_values=cache, **given))
    assert float((answers[0] == answers[1]).float().mean()) > 0.97  # near ties may be decided differently


@pytest.mark.parametrize("sinks", [0, 5])
@pytest.mark.parametrize("count", [1, 40, 100, 130, 195, 199])
def test_what_is_cropped_was_never_there(sinks: int, count: int) -> None:
    model, ids = long_model("llama"), long_ids()
    codec = fine_codec(model, sinks=sinks)
    cache = CompressedCache(model, codec)
    in_pieces(model, cache, ids, (200,))
    cache.crop(-count)
    assert cache.get_seq_length() == 200 - count
    new = long_ids(length=8, seed=9)
    found = in_pieces(model, cache, new, (8,))
    plain = in_pieces(model, DynamicCache(config=model.config), torch.cat([ids[:, : 200 - count], new], 1), (208 - count,))
    assert distance(found, plain[:, -8:]) < 0.06  # few tokens remain, some of them unpacked


def test_a_cache_continues_over_several_turns_and_begins_anew_after_reset() -> None:
    model, ids = long_model("llama"), long_ids()
    cache = CompressedCache(model, fine_codec(model))
    first = model.generate(ids[:, :120], past_key_values=cache, max_new_tokens=10, do_sample=False, pad_token_id=0)
    longer = torch.cat([first, ids[:, 120:150]], 1)
    found = model.generate(longer, past_key_values=cache, max_new_tokens=10, do_sample=False, pad_token_id=0)
    plain = model.generate(longer, max_new_tokens=10, do_sample=False, pad_token_id=0)
    assert float((found == plain).float().mean()) > 0.95
    cache.reset()
    assert cache.get_seq_length() == 0 and cache.nbytes == 0
    assert distance(in_pieces(model, cache, ids), in_pieces(model, DynamicCache(config=model.config), ids)) < 0.02


def test_rows_can_be_repeated_and_chosen() -> None:
    model, ids = long_model("llama"), long_ids()
    cache = CompressedCache(model, fine_codec(model, sinks=2))
    in_pieces(model, cache, ids, (150,))
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([3, 0]))
    found = in_pieces(model, cache, ids[[1, 0]][:, 150:], (20,))
    plain = in_pieces(model, DynamicCache(config=model.config), ids[[1, 0]], (150, 20))
    assert distance(found, plain[:, 150:]) < 0.02


# Stored bytes


def test_bytes_are_those_of_blocks_sinks_and_window() -> None:
    model, ids = long_model("llama"), long_ids()
    cache = CompressedCache(model, fine_codec(model, sinks=4))
    in_pieces(model, cache, ids, (200,))
    layers, values = 3, 2 * 2 * 16  # slots, KV heads, head_dim
    blocks, window = (200 - 4) // BLOCK, (200 - 4) % BLOCK
    assert cache.nbytes == 2 * layers * values * (blocks * BLOCK + 2 * (4 + window))
    ledger = cache.ledger()
    assert sum(ledger.values()) == cache.nbytes and ledger["empty"] == 0
    assert ledger["keys"] == ledger["values"] == 2 * layers * values // 2 * blocks * BLOCK
    assert ledger["sinks"] == 2 * layers * values * 2 * 4


def test_storages_grow_without_touching_the_past_and_little_of_them_is_empty() -> None:
    model, ids = long_model("llama"), long_ids(length=250)
    cache = CompressedCache(model, fine_codec(model))
    in_pieces(model, cache, ids, (130,))
    first = cache.compressed_layers[0].chunks[0].keys.data_ptr()
    in_pieces(model, cache, ids[:, 130:], (1,) * 120)
    layer = cache.compressed_layers[0]
    assert layer.chunks[0].keys.data_ptr() == first and layer.blocks == 3
    layer.packed.append(
        *(torch.zeros(2, 100, x.shape[2], dtype=torch.uint8) for x in (layer.chunks[0].keys, layer.chunks[0].values))
    )
    for _ in range(40):
        one = (torch.ones(2, 1, x.shape[2], dtype=torch.uint8) for x in (layer.chunks[0].keys, layer.chunks[0].values))
        layer.packed.append(*one)
        room = sum(chunk.keys.shape[1] for chunk in layer.chunks)
        assert room - layer.blocks <= layer.blocks / 8 + 1
    assert layer.blocks == 143 and all(int(chunk.slot(0).min()) == 1 for chunk in layer.chunks[-1:])


def test_what_a_sliding_window_has_left_behind_is_dropped() -> None:
    model, ids = long_model("gemma3_text"), long_ids()
    cache = CompressedCache(model, fine_codec(model))
    in_pieces(model, cache, ids, (20,) * 10)
    sliding = [layer for layer in cache.compressed_layers if layer.is_sliding]
    whole = [layer for layer in cache.compressed_layers if not layer.is_sliding]
    assert sliding and whole and all(layer.dropped and layer.blocks < 3 for layer in sliding)
    assert all(layer.blocks == 3 and not layer.dropped for layer in whole)
    assert {layer.get_seq_length() for layer in cache.compressed_layers} == {200}


# Refusals


def test_the_model_of_another_cache_is_refused_in_the_same_pass_and_nothing_is_lost() -> None:
    model, other, ids = long_model("llama"), copy.deepcopy(long_model("llama")), long_ids()
    cache = CompressedCache(model, fine_codec(model))
    with torch.no_grad():
        model(input_ids=ids[:, :100], past_key_values=cache, use_cache=True)
        with pytest.raises(CodecError, match="layer 0: the model cannot read the compressed cache, which was made for"):
            other(input_ids=ids[:, 100:101], past_key_values=cache, use_cache=True)
        assert cache.get_seq_length() == 100
        keep = CompressedCache(other, fine_codec(other))
        with pytest.raises(CodecError, match="was made for another model: make a CompressedCache for this model"):
            other(input_ids=ids[:, 100:101], past_key_values=cache, use_cache=True)
        found = model(input_ids=ids[:, 100:], past_key_values=cache, use_cache=True).logits
        assert distance(found, model(input_ids=ids).logits[:, 100:]) < 3e-2
        assert keep.get_seq_length() == 0 and cache.get_seq_length() == LONG


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_attention_is_switched_in_passes_with_a_live_cache_and_in_no_others(attention: str) -> None:
    model, ids = copy.deepcopy(long_model("llama")), long_ids()
    model.set_attn_implementation(attention)
    hooks = len(model._forward_pre_hooks)
    with torch.no_grad():
        expected = model(input_ids=ids, output_attentions=attention == "eager")
        cache = CompressedCache(model, fine_codec(model))
        found = [
            model(input_ids=ids[:, a:b], past_key_values=cache, use_cache=True).logits for a, b in ((0, 150), (150, LONG))
        ]
        assert distance(torch.cat(found, 1), expected.logits) < 3e-2
        assert model.config._attn_implementation == attention
        if attention == "eager":
            assert model(input_ids=ids, output_attentions=True).attentions[0].equal(expected.attentions[0])
        with pytest.raises(CodecError, match="output_attentions=True: a compressed cache returns no attention weights"):
            model(input_ids=ids[:, :1], past_key_values=cache, use_cache=True, output_attentions=True)
        assert model.config._attn_implementation == attention and cache.get_seq_length() == LONG
    del cache
    assert len(model._forward_pre_hooks) == hooks and "prepare_inputs_for_generation" not in vars(model)


def test_a_copy_shares_the_codec_and_continues_by_itself() -> None:
    model, ids = long_model("llama"), long_ids()
    cache = CompressedCache(model, fine_codec(model, sinks=4))
    with torch.no_grad():
        model(input_ids=ids[:, :150], past_key_values=cache, use_cache=True)
        copied = copy.deepcopy(cache)
        assert copied.codec is cache.codec and copied.nbytes == cache.nbytes
        for one, other in zip(copied.compressed_layers, cache.compressed_layers, strict=True):
            assert all(a is b for a, b in zip(one.heads, other.heads, strict=True))
        first = model(input_ids=ids[:, 150:], past_key_values=copied, use_cache=True).logits
        assert (cache.get_seq_length(), copied.get_seq_length()) == (150, LONG)
        assert model(input_ids=ids[:, 150:], past_key_values=cache, use_cache=True).logits.equal(first)


@pytest.mark.parametrize("what", ["forward", "model"])
def test_a_compiled_model_reads_packed_blocks(what: str) -> None:
    model, ids = copy.deepcopy(long_model("llama")), long_ids(1)
    expected = model(input_ids=ids).logits.detach()
    codec, compiled = fine_codec(model), model
    if what == "forward":
        model.forward = torch.compile(model.forward, backend="eager")
    else:
        compiled = torch.compile(model, backend="eager")
    cache, found = CompressedCache(compiled, codec), []
    with torch.no_grad():
        for a, b in ((0, 150), (150, 151), (151, 152), (152, LONG)):
            found.append(compiled(input_ids=ids[:, a:b], past_key_values=cache, use_cache=True).logits)
    assert cache.compressed_layers[0].blocks == 3
    assert distance(torch.cat(found, 1), expected) < 3e-2


def test_the_codec_of_another_model_is_refused() -> None:
    other = long_model("qwen2")
    with pytest.raises(CodecError, match="fitted on another model"):
        in_pieces(other, CompressedCache(other, fine_codec(long_model("deepseek_v2"))), long_ids(), (20,))


def test_nan_names_the_layer_and_loses_nothing() -> None:
    model, ids = long_model("llama"), long_ids()
    cache = CompressedCache(model, fine_codec(model))
    in_pieces(model, cache, ids, (60,))
    with torch.no_grad():
        weight = model.model.layers[1].self_attn.v_proj.weight
        kept = weight.clone()
        weight[0, 0] = torch.nan
    try:
        with pytest.raises(NonFiniteError, match="layer 1: values contain NaN or infinite numbers"):
            in_pieces(model, cache, ids[:, 60:], (10,))
    finally:
        with torch.no_grad():
            weight.copy_(kept)


def test_going_forward_by_a_crop_is_refused() -> None:
    model = long_model("llama")
    cache = CompressedCache(model, fine_codec(model))
    in_pieces(model, cache, long_ids(), (30,))
    with pytest.raises(ValueError, match="as a negative number"):
        cache.crop(5)


@pytest.mark.parametrize("name", ["llama", "gemma2", "deepseek_v2"])
def test_gradients_of_new_tokens_flow_through_the_packed_past(name: str) -> None:
    model, ids = long_model(name), long_ids()
    cache = CompressedCache(model, fine_codec(model, sinks=2))
    in_pieces(model, cache, ids, (150,))
    embedded = model.get_input_embeddings()(ids[:, 150:160]).detach().requires_grad_()
    expected = in_pieces(model, CompressedCache(model, fine_codec(model, sinks=2)), ids, (150, 10))[:, 150:]
    logits = model(inputs_embeds=embedded, past_key_values=cache, use_cache=True).logits
    assert distance(logits.detach(), expected) < 1e-3
    logits.square().mean().backward()
    assert embedded.grad is not None and float(embedded.grad.abs().max()) > 0
