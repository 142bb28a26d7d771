"""The geometry read from a configuration equals what the cache of the model holds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import CONFIG_MAPPING, DynamicCache

import tiny_models
from eigencache.errors import NoCacheError, UnsupportedArchitectureError
from eigencache.geometry import KINDS, KVGeometry, geometry_from_config, kind_and_frame, tensor_name

LLAMA_8B = {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8}


def geometry_of(model_type: str, **options: Any) -> KVGeometry:
    return geometry_from_config(CONFIG_MAPPING[model_type](**options))


# attention, layers with a cache, KV heads, head_dim, rotary_dim (None: no rotation), values cached per token
EXPECTED: dict[str, tuple[str, dict[str, Any], tuple]] = {
    "gpt2": ("gpt2", {}, ("MHA", 12, 12, 64, None, 12 * 2 * 768)),
    "gpt_neox": ("gpt_neox", {}, ("MHA", 44, 64, 96, 24, 44 * 2 * 6144)),
    "llama 8B": ("llama", LLAMA_8B, ("GQA", 32, 8, 128, 128, 32 * 2 * 1024)),
    "mistral": ("mistral", {}, ("GQA", 32, 8, 128, 128, 32 * 2 * 1024)),
    "qwen2": ("qwen2", {"num_key_value_heads": 4}, ("GQA", 32, 4, 128, 128, 32 * 2 * 512)),
    "gemma2": ("gemma2", {}, ("GQA", 26, 4, 256, 256, 26 * 2 * 1024)),
    "gemma3_text": ("gemma3_text", {}, ("GQA", 26, 4, 256, 256, 26 * 2 * 1024)),
    "gemma3n_text": ("gemma3n_text", {}, ("GQA", 20, 2, 256, 256, 20 * 2 * 512)),
    "gemma4_text": ("gemma4_text", {}, ("GQA", 30, 4, 256, 128, (25 * 256 + 5 * 512) * 2 * 4)),
    "phi3": ("phi3", {}, ("MHA", 32, 32, 96, 96, 32 * 2 * 3072)),
    "falcon, one head": ("falcon", {}, ("MQA", 32, 1, 64, 64, 32 * 2 * 64)),
    "falcon, all heads": ("falcon", {"multi_query": False}, ("MHA", 32, 71, 64, 64, 32 * 2 * 4544)),
    "falcon, groups": (
        "falcon",
        {"new_decoder_architecture": True, "num_kv_heads": 8},
        ("MHA", 32, 71, 64, 64, 32 * 2 * 4544),
    ),
    "falcon, alibi": ("falcon", {"alibi": True}, ("MQA", 32, 1, 64, None, 32 * 2 * 64)),
    "gpt_oss": ("gpt_oss", {}, ("GQA", 36, 8, 64, 64, 36 * 2 * 512)),
    "deepseek_v2": ("deepseek_v2", {}, ("MLA", 32, 32, 192, 64, 32 * (512 + 64))),
    "deepseek_v3": ("deepseek_v3", {}, ("MLA", 61, 128, 192, 64, 61 * (512 + 64))),
    "mistral4": ("mistral4", {}, ("MLA", 36, 32, 128, 64, 36 * (256 + 64))),
    "kimi_linear": ("kimi_linear", {}, ("MLA", 6, 32, 192, None, 6 * (512 + 64))),
    "qwen3_next": ("qwen3_next", {}, ("GQA", 12, 2, 256, 64, 12 * 2 * 512)),
    "jamba": ("jamba", {}, ("GQA", 4, 8, 128, None, 4 * 2 * 1024)),
    "zamba2": ("zamba2", {}, ("MHA", 9, 32, 160, None, 9 * 2 * 5120)),
}


@pytest.mark.parametrize(("model_type", "options", "expected"), EXPECTED.values(), ids=EXPECTED)
def test_geometry_is_read_from_the_configuration(model_type: str, options: dict[str, Any], expected: tuple) -> None:
    g = geometry_of(model_type, **options)
    rotary_dim = g.rope.rotary_dim if g.rope else None
    found = (g.attention, len(g.cached_layers), g.num_key_value_heads, g.head_dim, rotary_dim, g.values_per_token)
    assert found == expected
    assert g.num_hidden_layers == len(g.layers) == len(g.cached_layers) + len(g.skipped)
    assert [layer.layer_idx for layer in g.layers] == list(range(len(g.layers)))
    assert g.model_type == model_type
    assert KVGeometry.model_validate_json(g.model_dump_json()) == g


def test_llama_of_eight_billion_takes_131072_bytes_per_token_at_half_its_width() -> None:
    geometry = geometry_of("llama", **LLAMA_8B)
    assert 2 * geometry.values_per_token == 131_072
    assert geometry.width_ratio == 0.5
    assert "131072 bytes per token at 16 bit, KV width / hidden size 0.50" in geometry.describe()


def test_the_width_ratio_counts_layers_with_a_cache_alone() -> None:
    assert geometry_of("qwen3_next").width_ratio == 2 * 2 * 256 / 2048


def test_a_latent_is_counted_as_stored_and_as_expanded() -> None:
    geometry = geometry_of("deepseek_v3")
    assert geometry.values_per_token == 61 * 576
    assert geometry.expanded_values_per_token == 61 * 128 * (192 + 128)
    assert geometry.width_ratio == pytest.approx(576 / 7168)
    assert (geometry.mla.kv_lora_rank, geometry.mla.qk_rope_head_dim, geometry.mla.qk_nope_head_dim) == (512, 64, 128)
    assert "latent 512 + rotary key 64" in geometry.describe()


@pytest.mark.parametrize(
    ("model_type", "options", "windows"),
    [
        ("llama", {}, {None: 32}),
        ("mistral", {}, {4096: 32}),
        ("qwen2", {}, {None: 32}),
        ("qwen3_moe", {"use_sliding_window": True, "sliding_window": 128}, {128: 24}),
        ("gemma2", {}, {4096: 13, None: 13}),
        ("gemma3_text", {"sliding_window": 512}, {512: 22, None: 4}),
        ("gpt_oss", {}, {128: 18, None: 18}),
        ("llama4_text", {}, {8192: 36, None: 12}),
    ],
)
def test_windows_are_those_of_each_layer(model_type: str, options: dict[str, Any], windows: dict[int | None, int]) -> None:
    found = [layer.window for layer in geometry_of(model_type, **options).layers]
    assert {window: found.count(window) for window in found} == windows


def test_a_window_that_is_stated_and_not_used_is_none() -> None:
    config = CONFIG_MAPPING["qwen3_moe"](use_sliding_window=False)
    config.sliding_window = 128
    assert {layer.window for layer in geometry_from_config(config).layers} == {None}


@pytest.mark.parametrize(
    ("model_type", "theta", "rope_type"),
    [("gemma3_text", 1e6, "default"), ("gpt_oss", 150_000.0, "yarn"), ("llama", 10_000.0, "default")],
)
def test_rotation_is_that_of_layers_with_full_attention(model_type: str, theta: float, rope_type: str) -> None:
    rope = geometry_of(model_type).rope
    assert (rope.theta, rope.rope_type) == (theta, rope_type)


@pytest.mark.parametrize(
    ("model_type", "cached", "why"),
    [
        ("jamba", [4, 12, 20, 28], "linear attention"),
        ("qwen3_next", list(range(3, 48, 4)), "linear attention"),
        ("gemma3n_text", list(range(20)), "shares the cache of another layer"),
    ],
)
def test_layers_without_a_cache_are_named_with_their_reason(model_type: str, cached: list[int], why: str) -> None:
    geometry = geometry_of(model_type)
    assert list(geometry.cached_layers) == cached
    assert set(geometry.skipped.values()) == {why}
    assert f"no cache: {len(geometry.skipped)} × {why}" in geometry.describe()


def test_what_differs_from_the_published_width_is_noted() -> None:
    (note,) = geometry_of("falcon", new_decoder_architecture=True, num_kv_heads=8).notes
    assert note == "this implementation caches 71 copies of 8 KV heads"
    assert geometry_of("falcon").notes == ()


@pytest.mark.parametrize(("model_type", "why"), [("mamba", "Mamba"), ("falcon_mamba", "Mamba"), ("xlstm", "recurrent")])
def test_a_model_without_attention_has_no_cache(model_type: str, why: str) -> None:
    with pytest.raises(NoCacheError, match=f"{model_type} has no KV cache: all of its [0-9]+ layers are {why}"):
        geometry_of(model_type)


def test_rotation_by_several_position_axes_is_refused() -> None:
    parameters = {"rope_type": "default", "rope_theta": 1e7, "mrope_section": [11, 11, 10], "partial_rotary_factor": 0.25}
    with pytest.raises(UnsupportedArchitectureError, match=r"qwen3_5_text .*mRoPE, sections \[11, 11, 10\]"):
        geometry_of("qwen3_5_text", rope_parameters=parameters)


def test_a_cache_of_its_own_kind_is_refused() -> None:
    with pytest.raises(UnsupportedArchitectureError, match="deepseek_v4 uses a cache of another kind than keys and values"):
        geometry_of("deepseek_v4")


# One layer of mistral_large4 does not rotate and stores no rotary key; its geometry does not distinguish that layer.
CACHED = sorted(set(tiny_models.available()) - set(tiny_models.NO_CACHE_NAMES) - {"qwen3_5_text", "mistral_large4"})


@pytest.mark.parametrize("name", CACHED)
def test_geometry_is_what_the_cache_holds(name: str) -> None:
    model = tiny_models.tiny(name)
    geometry, cache = geometry_from_config(model.config), DynamicCache(config=model.config)
    with torch.no_grad():
        model.base_model(input_ids=tiny_models.token_ids(), past_key_values=cache, use_cache=True)
    held = {
        layer_idx: (layer.keys.shape[1], layer.keys.shape[3], layer.values.shape[1], layer.values.shape[3])
        for layer_idx, layer in enumerate(cache.layers)
        if isinstance(getattr(layer, "keys", None), torch.Tensor)
    }
    expected = {
        layer.layer_idx: (1, layer.mla.kv_lora_rank, 1, layer.mla.qk_rope_head_dim)
        if layer.mla
        else (layer.num_key_value_heads, layer.head_dim, layer.num_key_value_heads, layer.v_head_dim)
        for layer in geometry.layers
        if layer.cached
    }
    assert held == expected
    assert geometry.values_per_token == sum(heads * dim + v_heads * v_dim for heads, dim, v_heads, v_dim in held.values())
    assert (geometry.rope is None) == (name in tiny_models.NO_ROTATION_NAMES)


NAMES = {
    "keys_pre_rope": ("keys", "pre_rope"),
    "keys_post_rope": ("keys", "post_rope"),
    "keys": ("keys", "unrotated"),
    "values": ("values", "unrotated"),
    "latent": ("latent", "unrotated"),
    "key_rope_pre_rope": ("key_rope", "pre_rope"),
    "key_rope_post_rope": ("key_rope", "post_rope"),
    "keys_nope": ("keys_nope", "unrotated"),
}


@pytest.mark.parametrize(("name", "kind", "frame"), [(name, *parts) for name, parts in NAMES.items()])
def test_a_name_is_a_kind_and_a_frame(name: str, kind: str, frame: str) -> None:
    assert tensor_name(kind, frame) == name
    assert kind_and_frame(name) == (kind, frame)


@settings(derandomize=True)
@given(st.sampled_from(KINDS), st.sampled_from(["pre_rope", "post_rope", "unrotated"]))
def test_names_and_their_parts_are_inverse_of_each_other(kind: str, frame: str) -> None:
    assert kind_and_frame(tensor_name(kind, frame)) == (kind, frame)
