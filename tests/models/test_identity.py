"""The hash of a model covers everything that its cache depends on and nothing else; a change is detected at the next use."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from eigencache.api import CacheCodec
from eigencache.errors import CodecError
from eigencache.models import identity
from eigencache.models.identity import _sample, fingerprint, fingerprint_before, known_fingerprint, state_of
from eigencache.models.sources import bundled_path
from stub_codecs import bundled
from tiny_models import tiny


@pytest.fixture
def model() -> Any:
    return copy.deepcopy(tiny("llama"))


@pytest.mark.parametrize("shape", [(4096, 256), (128, 48), (7,), (), (192, 576), (3, 5, 8), (50, 11_008)])
def test_every_row_and_column_of_a_weight_is_seen(shape: tuple[int, ...]) -> None:
    places = torch.arange(torch.Size(shape).numel()).view(shape)
    seen = _sample(places)
    for size in (torch.Size(shape[i:]).numel() for i in range(1, len(shape))):
        assert len(torch.unique(seen % size if size == shape[-1] else seen)) >= min(size, len(seen))
    if len(shape) == 2:
        assert len(torch.unique(seen % shape[1])) == shape[1]
        assert len(torch.unique(seen // shape[1])) == min(shape[0], len(seen))


@pytest.mark.parametrize("name", ["ref-llama", "ref-gpt2", "ref-qwen2", "ref-deepseek"])
def test_one_column_of_an_embedding_makes_another_model(name: str) -> None:
    model = copy.deepcopy(bundled(name).model)
    before = fingerprint(model)
    with torch.no_grad():
        model.get_input_embeddings().weight[:, 1] += 1
    assert fingerprint(model) != before


@pytest.mark.parametrize(
    "change",
    [
        lambda m: setattr(m.config, "pad_token_id", 3),
        lambda m: setattr(m.config, "use_cache", False),
        lambda m: setattr(m.config, "id2label", {0: "a", 1: "b"}),
        lambda m: setattr(m.config, "output_hidden_states", True),
        lambda m: setattr(m.config, "attention_dropout", 0.5),
        lambda m: setattr(m.config, "_name_or_path", "elsewhere"),
        lambda m: setattr(m.config, "transformers_version", "5.99"),
        lambda m: m.set_attn_implementation("eager"),
        lambda m: m.train().requires_grad_(False),
    ],
)
def test_what_the_cache_does_not_depend_on_makes_no_other_model(change: Callable[[Any], Any], model) -> None:
    before = fingerprint(model)
    change(model)
    assert fingerprint(model) == before


@pytest.mark.parametrize(
    "change",
    [
        lambda m: setattr(m.config, "rms_norm_eps", 1e-3),
        lambda m: setattr(m.config, "hidden_act", "relu"),
        lambda m: m.config.rope_parameters.update(rope_theta=3.0),
        lambda m: m.to(torch.bfloat16),
        lambda m: m.model.layers[2].mlp.down_proj.weight.data.mul_(1.01),
    ],
)
def test_what_the_cache_depends_on_makes_another_model(change: Callable[[Any], Any], model) -> None:
    before = fingerprint(model)
    change(model)
    assert fingerprint(model) != before


def test_wrappers_change_nothing_and_adapters_do_while_they_are_active(model) -> None:
    peft = pytest.importorskip("peft")
    before = fingerprint(model)
    assert fingerprint(torch.compile(model, backend="eager")) == before
    config = peft.LoraConfig(r=2, target_modules=["k_proj"], init_lora_weights=False)
    wrapped = peft.get_peft_model(model, config)
    with_adapter = fingerprint(wrapped)
    assert with_adapter == fingerprint(wrapped.base_model.model) != before
    with wrapped.disable_adapter():
        assert fingerprint(wrapped) == before
    assert fingerprint(wrapped) == with_adapter
    wrapped.merge_adapter()
    assert fingerprint(wrapped) not in (before, with_adapter)


def test_the_state_changes_with_weights_and_modules(model) -> None:
    states = [state_of(model)]
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1
        states.append(state_of(model))
        model.model.norm.weight = nn.Parameter(model.model.norm.weight.clone())
        states.append(state_of(model))
    assert len(set(states)) == 3 and state_of(model) == states[-1]


def test_a_codec_in_memory_is_refused_for_a_model_that_changed_and_taken_again_when_it_is_restored(model) -> None:
    codec = CacheCodec(bundled("ref-llama"), None, identity=fingerprint(model))  # type: ignore[arg-type]
    codec.require_model(model)
    codec.require_model(copy.deepcopy(model))
    kept = model.lm_head.weight[0, 0].item()
    for value, right in ((kept + 1, False), (kept, True)):
        with torch.no_grad():
            model.model.embed_tokens.weight[0, 0] += value - kept
        if right:
            model.load_state_dict(tiny("llama").state_dict())
            codec.require_model(model)
        else:
            with pytest.raises(CodecError, match="not the one that this codec was fitted on: other weights"):
                codec.require_model(model)


def test_codecs_saved_before_are_recognized(model) -> None:
    assert fingerprint_before(model) == fingerprint_before(tiny("llama")) != fingerprint(model)


@pytest.mark.versions
@pytest.mark.parametrize(
    ("name", "start"),
    [
        ("ref-gpt2", "2b0c280625d8"),
        ("ref-llama", "fe3531e7172b"),
        ("ref-qwen2", "893b0cd84c25"),
        ("ref-deepseek", "0e59be91fef2"),
    ],
)
def test_every_version_of_transformers_gives_the_same_hash(name: str, start: str) -> None:
    assert fingerprint(bundled(name).model).startswith(start)


def test_hashes_do_not_depend_on_what_a_later_version_adds_as_a_default(model) -> None:
    before = fingerprint(model)
    model.config.router_aux_loss_coef = 0.5
    model.config.layer_types = ["full_attention"] * 3
    assert fingerprint(model) == before
    model.config.layer_types = ["sliding_attention"] * 3
    assert fingerprint(model) != before


def test_a_module_that_peft_trains_a_copy_of_counts_while_the_copy_is_used(model) -> None:
    peft = pytest.importorskip("peft")
    before = fingerprint(model)
    config = peft.LoraConfig(r=2, target_modules=["k_proj"], modules_to_save=["embed_tokens"], init_lora_weights=False)
    wrapped = peft.get_peft_model(model, config)
    with_copy = fingerprint(wrapped)
    with torch.no_grad():
        wrapped.get_input_embeddings().modules_to_save["default"].weight[0, 0] += 1
    assert fingerprint(wrapped) not in (before, with_copy)
    with wrapped.disable_adapter():
        assert fingerprint(wrapped) == before


def test_the_hash_is_made_anew_only_where_something_changed(model, monkeypatch) -> None:
    made = []
    monkeypatch.setattr(identity, "fingerprint", lambda model: made.append(model) or f"{len(made)}")
    assert [known_fingerprint(model) for _ in range(3)] == ["1", "1", "1"]
    model.lm_head.weight.data = model.lm_head.weight.data.clone()  # the values may differ now
    assert [known_fingerprint(model) for _ in range(2)] == ["2", "2"]
    with torch.no_grad():
        model(torch.ones(1, 4, dtype=torch.int64))
    assert known_fingerprint(model) == "2"


@pytest.fixture
def offloaded(tmp_path: Path) -> Any:
    """A bundled model whose last layer is offloaded to disk."""
    pytest.importorskip("accelerate")
    parts = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    layers = {f"model.layers.{i}": "cpu" if i < 6 else "disk" for i in range(7)}
    return AutoModelForCausalLM.from_pretrained(
        bundled_path("ref-llama"), dtype=torch.float32, device_map=parts | layers, offload_folder=tmp_path
    ).eval()


def test_weights_on_disk_are_hashed_and_no_change_is_seen_in_a_pass(offloaded) -> None:
    assert fingerprint(offloaded) == fingerprint(bundled("ref-llama").model)
    before = state_of(offloaded)
    with torch.no_grad():
        offloaded(torch.ones(1, 4, dtype=torch.int64))
    assert state_of(offloaded) == before


@pytest.mark.parametrize("bits", [8, 4])
def test_packed_weights_are_hashed_with_their_scales(bits: int, model, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    if bits == 4 and torch.cpu.get_capabilities().get("avx512_bf16"):
        pytest.skip("bitsandbytes repacks weights of 4 bits in the first pass on such a CPU, and fails with so small ones")
    model.save_pretrained(tmp_path)
    options = {8: {"load_in_8bit": True}, 4: {"load_in_4bit": True}}[bits]
    packed = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=BitsAndBytesConfig(**options)).eval()
    before = fingerprint(packed)
    with torch.no_grad():
        packed(torch.ones(1, 4, dtype=torch.int64))
    assert fingerprint(packed) == before != fingerprint(model)
    layer = packed.model.layers[1].self_attn.k_proj
    with torch.no_grad():
        (layer.state.SCB if bits == 8 else layer.weight.quant_state.absmax)[0] *= 2
    assert fingerprint(packed) != before


def test_weights_of_torchao_are_hashed_and_a_codec_of_before_is_no_error(model) -> None:
    torchao = pytest.importorskip("torchao.quantization")
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig(), filter_fn=lambda module, _: isinstance(module, nn.Linear))
    before = fingerprint(model)
    assert fingerprint(model) == before != fingerprint(tiny("llama"))
    assert fingerprint_before(model) != fingerprint_before(tiny("llama"))
