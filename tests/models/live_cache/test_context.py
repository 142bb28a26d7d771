"""`compressed()` works through wrappers of the model; contexts may overlap, and the last one restores the model."""

import copy
from typing import Any

import pytest
import torch
import transformers
from packaging import version
from torch import Tensor, nn
from transformers import DynamicCache

from eigencache import CompressedCache, compressed
from eigencache.codec.live.codec import LiveCodec
from eigencache.errors import CodecError, UnsupportedArchitectureError
from eigencache.models.caches.keyword import cache_keyword, cache_returned
from live_codecs import fine_codec, long_ids, long_model
from tiny_models import GQA, LONGROPE, built

pytestmark = [pytest.mark.versions, pytest.mark.slow]
GREEDY = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None, "return_dict_in_generate": True}


@pytest.fixture
def model() -> Any:
    return copy.deepcopy(long_model("llama"))


@pytest.fixture
def codec(model) -> LiveCodec:
    return fine_codec(model)


def kind(output: Any) -> type:
    return type(cache_returned(output))


@torch.no_grad()
def kinds(model: Any, ids: Tensor) -> list[type]:
    """Return the types of the caches that a pass and a generation made."""
    return [kind(model(input_ids=ids, use_cache=True)), kind(model.generate(input_ids=ids, **GREEDY))]


def test_a_pass_and_a_generation_make_compressed_caches(model, codec) -> None:
    ids = long_ids(1, 100)
    with compressed(model, codec):
        assert kinds(model, ids) == [CompressedCache] * 2
        assert kind(model(ids, use_cache=True, return_dict=False)) is CompressedCache
        assert kind(model(ids, use_cache=False)) is type(None)
    assert kinds(model, ids) == [DynamicCache] * 2


def test_a_cache_that_is_handed_over_is_respected_under_either_keyword(model, codec) -> None:
    ids, keyword = long_ids(1, 100), cache_keyword(model.forward)
    with compressed(model, codec):
        for name in {keyword, "past_key_values"}:
            own = DynamicCache(config=model.config)
            assert cache_returned(model(ids, use_cache=True, **{name: own})) is own and own.get_seq_length() == 100


def test_a_compiled_model_makes_them_too(model, codec) -> None:
    ids, compiled = long_ids(1, 100), torch.compile(model, backend="eager")
    with compressed(compiled, codec):
        assert kinds(compiled, ids) == [CompressedCache] * 2
    with compressed(model, codec):
        assert kinds(compiled, ids) == [CompressedCache] * 2
    assert kinds(compiled, ids) == [DynamicCache] * 2


def test_a_model_with_an_adapter_makes_them_too(model, codec) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    wrapped, ids = peft.get_peft_model(model, config).eval(), long_ids(1, 100)
    for entered in (wrapped, wrapped.base_model.model):
        with compressed(entered, codec):
            for called in (wrapped, wrapped.base_model.model):
                assert kinds(called, ids) == [CompressedCache] * 2
        assert kinds(wrapped, ids) == [DynamicCache] * 2


def test_prefix_tuning_and_other_modules_are_refused_by_name(model, codec) -> None:
    peft = pytest.importorskip("peft")
    tuned = peft.get_peft_model(model, peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    for make in (CompressedCache, lambda m, c: compressed(m, c).__enter__()):
        with pytest.raises(UnsupportedArchitectureError, match="prefix and prompt tuning put keys and values of their own"):
            make(tuned, codec)
        with pytest.raises(
            UnsupportedArchitectureError, match="`model` is of type Linear, which neither is nor contains a transformers"
        ):
            make(nn.Linear(2, 2), codec)


def test_contexts_may_overlap_and_the_last_to_end_restores_the_model(model, codec) -> None:
    ids, attention = long_ids(1, 100), model.config._attn_implementation
    first, second = compressed(model, codec), compressed(model, codec)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert kinds(model, ids) == [CompressedCache] * 2
    second.__exit__(None, None, None)
    assert kinds(model, ids) == [DynamicCache] * 2
    assert model.config._attn_implementation == attention
    assert not {"generate", "forward", "prepare_inputs_for_generation"} & vars(model).keys()
    assert not model._forward_pre_hooks and not model.base_model._forward_pre_hooks


def test_a_pass_that_returns_another_cache_is_an_error(model, codec, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = model.forward

    def deaf(input_ids: Tensor, use_cache: bool = True, **_: Any) -> Any:
        return forward(input_ids=input_ids, use_cache=use_cache)

    monkeypatch.setattr(model, "forward", deaf)
    with compressed(model, codec), pytest.raises(CodecError, match="LlamaForCausalLM did not use the compressed cache"):
        model(input_ids=long_ids(1, 70), use_cache=True)


def test_a_cache_from_inside_continues_after_the_context(model, codec) -> None:
    ids = long_ids(1, 150)
    with torch.no_grad():
        expected = model(ids).logits[:, 140:]
        with compressed(model, codec):
            cache = cache_returned(model(ids[:, :140], use_cache=True))
        found = model(ids[:, 140:], use_cache=True, **{cache_keyword(model.forward): cache}).logits
    assert cache.compressed_layers[0].blocks == 2
    assert float((found - expected).abs().max()) < 0.1


@pytest.mark.skipif(version.parse(transformers.__version__) < version.parse("5.18"), reason="Phi-3 forgets its text there")
@pytest.mark.parametrize("inside", [False, True])
def test_a_model_that_reads_everything_again_reads_it_into_the_same_cache(inside: bool) -> None:
    rope = LONGROPE | {"original_max_position_embeddings": 80}
    lengths = {"original_max_position_embeddings": 80, "max_position_embeddings": 256}
    phi3 = built("phi3", "AutoModelForCausalLM", GQA | {"hidden_size": 64, "rope_parameters": rope} | lengths)
    codec, ids, options = (
        fine_codec(phi3, window=64),
        long_ids(1, 70),
        GREEDY | {"max_new_tokens": 30, "output_logits": True},
    )
    plain = phi3.generate(input_ids=ids, **options)
    if inside:
        with compressed(phi3, codec):
            found = phi3.generate(input_ids=ids, **options)
        cache = cache_returned(found)
    else:
        cache = CompressedCache(phi3, codec)
        found = phi3.generate(input_ids=ids, **{cache_keyword(phi3.forward): cache}, **options)
        assert cache_returned(found) is cache
    assert isinstance(cache, CompressedCache) and cache.get_seq_length() == 99
    assert found.sequences.equal(plain.sequences)
    assert max(float((a - b).abs().max()) for a, b in zip(found.logits, plain.logits, strict=True)) < 0.1
