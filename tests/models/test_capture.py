"""Captured tensors equal the cache of the model, in the frame of their name, for every architecture."""

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from eigencache.errors import LayerError, NoCacheError, UnsupportedArchitectureError
from eigencache.geometry import geometry_from_config
from eigencache.models.capture import Capture, CapturedLayer
from eigencache.spectral.rope import rotate, unrotate
from tiny_models import MLA_NAMES, NO_CACHE_NAMES, NO_ROTATION_NAMES, NOT_BUILDABLE, available, tiny

pytestmark = pytest.mark.versions

LENGTH = 24
# Keys that are normalized after rotation, scaled by the layer before rotation, or rotated inside the layer: no reading of a
# projection reproduces the cache, so they are captured after rotation only.
AFTER_ROTATION_ONLY = {"gptj", "codegen", "hunyuan_v1_dense", "llama4_text", "falcon_h1", "recurrent_gemma", "nanochat"}
AFTER_ROTATION_ONLY |= {"zamba2_adapter"}
MULTI_AXIS = {"qwen3_5_text"}
CACHED = [
    name for name in available() if name not in NO_CACHE_NAMES and name not in MULTI_AXIS and name not in NOT_BUILDABLE
]


def captured(name: str, rows: int = 2, **options) -> list[CapturedLayer]:
    model = tiny(name)
    with Capture(model, geometry_from_config(model.config), **options) as capture:
        return capture.run(ids(rows))


def ids(rows: int = 2) -> Tensor:
    return torch.randint(1, 100, (rows, LENGTH), generator=torch.Generator().manual_seed(7))


def stored(layer: CapturedLayer, kind: str) -> Tensor:
    """Return the keys (or rotary keys) of the cache."""
    return layer.tensors.get(f"{kind}_post_rope", layer.tensors.get(kind))


@pytest.mark.parametrize("name", CACHED)
def test_what_is_captured_is_what_an_ordinary_cache_holds_afterwards(name: str) -> None:
    model = tiny(name)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model.base_model(input_ids=ids(), past_key_values=cache, use_cache=True)
    layers = captured(name)
    assert layers
    for layer in layers:
        held = cache.layers[layer.layer_idx]
        if name in MLA_NAMES and held.keys.shape[1] == 1:
            pairs = [(layer.tensors["latent"], held.keys)]
            pairs += [(stored(layer, "key_rope"), held.values)] if held.values.shape[-1] else []
        elif name in MLA_NAMES:  # expanded by older transformers
            rope = stored(layer, "key_rope")
            keys = layer.tensors["keys_nope"]
            keys = keys if rope is None else torch.cat([keys, rope.expand(-1, keys.shape[1], -1, -1)], -1)
            pairs = [(keys, held.keys), (layer.tensors["values"], held.values)]
        else:
            pairs = [(stored(layer, "keys"), held.keys), (layer.tensors["values"], held.values)]
        for mine, theirs in pairs:
            assert mine.shape[2] == LENGTH, "sliding windows too are captured whole"
            torch.testing.assert_close(mine[:, :, -theirs.shape[2] :], theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", CACHED)
def test_rotation_undone_and_redone_returns_the_stored_keys(name: str) -> None:
    rotated = [layer for layer in captured(name) if layer.pairing]
    expected = name not in NO_ROTATION_NAMES and name not in AFTER_ROTATION_ONLY and name not in {"kimi_linear", "glm5_next"}
    assert bool(rotated) == expected
    for layer in rotated:
        kind = "key_rope" if name in MLA_NAMES else "keys"
        before, after = layer.tensors[f"{kind}_pre_rope"], layer.tensors[f"{kind}_post_rope"]
        scale = float(after.abs().max())
        undone = unrotate(after, layer.angles, layer.pairing)
        assert float((undone - before).abs().max()) <= 1e-5 * scale
        assert float((rotate(undone, layer.angles, layer.pairing) - after).abs().max()) <= 1e-5 * scale
        assert float((before - after).abs().max()) > 1e-2 * scale, "rotation moves something"


def rms(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * weight


def array(x: Tensor) -> np.ndarray:
    return x.detach().to(torch.float64).numpy()


def linear(module, x: np.ndarray) -> np.ndarray:
    """Apply a projection by hand; the Conv1D of GPT-2 stores its weight transposed."""
    weight = array(module.weight)
    weight = weight if type(module).__name__ == "Conv1D" else weight.T
    return x @ weight + (0 if module.bias is None else array(module.bias))


def heads(x: np.ndarray, dim: int) -> np.ndarray:
    return x.reshape(*x.shape[:2], -1, dim).transpose(0, 2, 1, 3)


def plain(attention, hidden, dim):
    return heads(linear(attention.k_proj, hidden), dim), heads(linear(attention.v_proj, hidden), dim)


def normed(offset: float):
    def project(attention, hidden, dim):
        keys, values = plain(attention, hidden, dim)
        eps = getattr(attention.k_norm, "eps", None) or attention.k_norm.variance_epsilon
        return rms(keys, array(attention.k_norm.weight) + offset, eps), values

    return project


def gpt2(attention, hidden, dim):
    _, keys, values = np.split(linear(attention.c_attn, hidden), 3, -1)
    return heads(keys, dim), heads(values, dim)


def gpt_neox(attention, hidden, dim):
    per_head = heads(linear(attention.query_key_value, hidden), 3 * dim)
    return per_head[..., dim : 2 * dim], per_head[..., 2 * dim :]


def phi3(attention, hidden, dim):
    columns = linear(attention.qkv_proj, hidden)
    kv = attention.num_key_value_heads * dim
    return heads(columns[..., -2 * kv : -kv], dim), heads(columns[..., -kv:], dim)


def falcon(attention, hidden, dim):
    columns = linear(attention.query_key_value, hidden)
    return heads(columns[..., -2 * dim : -dim], dim), heads(columns[..., -dim:], dim)


BY_HAND = dict.fromkeys(["llama", "llama3", "mistral", "mixtral", "qwen2", "gemma2", "gpt_oss", "starcoder2", "glm4"], plain)
BY_HAND |= dict.fromkeys(["qwen3", "qwen3_moe"], normed(0.0)) | dict.fromkeys(["gemma3_text", "qwen3_next"], normed(1.0))
BY_HAND |= {"gpt2": gpt2, "gpt_neox": gpt_neox, "phi3": phi3, "falcon": falcon}


@pytest.mark.parametrize("name", BY_HAND)
def test_keys_before_rotation_and_values_agree_with_a_projection_by_hand_in_float64(name: str) -> None:
    model, inputs = tiny(name), {}
    layers = captured(name)
    attentions = {
        m.layer_idx: m for m in model.modules() if type(m).__name__.endswith("Attention") and hasattr(m, "layer_idx")
    }

    def keep(module, args, kwargs):
        inputs[module.layer_idx] = array(args[0] if args else kwargs["hidden_states"])

    handles = [a.register_forward_pre_hook(keep, with_kwargs=True) for a in attentions.values()]
    with torch.no_grad():
        model.base_model(input_ids=ids())
    for handle in handles:
        handle.remove()
    for layer in layers:
        keys, values = BY_HAND[name](attentions[layer.layer_idx], inputs[layer.layer_idx], layer.tensors["values"].shape[-1])
        mine = layer.tensors.get("keys_pre_rope", layer.tensors.get("keys"))
        np.testing.assert_allclose(array(mine), keys, rtol=1e-4, atol=1e-5 * np.abs(keys).max())
        np.testing.assert_allclose(array(layer.tensors["values"]), values, rtol=1e-4, atol=1e-5 * np.abs(values).max())


@pytest.mark.parametrize(
    "name", [n for n in ("deepseek_v2", "deepseek_v3", "minicpm3", "longcat_flash", "youtu") if n in CACHED]
)
def test_expanded_keys_and_values_of_mla_are_the_latent_times_the_up_projection(name: str) -> None:
    model = tiny(name)
    mla = geometry_from_config(model.config).mla
    ups = {m.layer_idx: m.kv_b_proj for m in model.modules() if hasattr(m, "kv_b_proj")}
    for layer in captured(name):
        expanded = linear(ups[layer.layer_idx], array(layer.tensors["latent"][:, 0]))
        expanded = heads(expanded, mla.qk_nope_head_dim + mla.v_head_dim)
        for mine, theirs in (
            (layer.tensors["keys_nope"], expanded[..., : mla.qk_nope_head_dim]),
            (layer.tensors["values"], expanded[..., mla.qk_nope_head_dim :]),
        ):
            np.testing.assert_allclose(array(mine), theirs, rtol=1e-4, atol=1e-5)


def _spy(seen: dict[int, Tensor]) -> str:
    def attention(module, query, key, value, mask, **kwargs):
        seen[module.layer_idx] = query
        return sdpa_attention_forward(module, query, key, value, mask, **kwargs)

    AttentionInterface.register("spy", attention)
    AttentionMaskInterface.register("spy", sdpa_mask)
    return "spy"


WITH_QUERIES = ["gpt2", "gpt_neox", "llama", "llama_yarn", "qwen2", "qwen3", "gemma3_text", "phi3", "qwen3_next", "cohere"]
WITH_QUERIES += ["deepseek_v2", "deepseek_v3", "longcat_flash", "minicpm3"]


@pytest.mark.parametrize("name", [name for name in WITH_QUERIES if name in CACHED])
def test_queries_after_rotation_are_those_that_attention_is_given(name: str) -> None:
    seen: dict[int, Tensor] = {}
    model = tiny(name)
    before = model.config._attn_implementation
    model.set_attn_implementation(_spy(seen))
    try:
        layers = captured(name, queries=True)
    finally:
        model.set_attn_implementation(before)
    for layer in layers:
        mine = layer.tensors.get("queries_post_rope", layer.tensors.get("queries"))
        torch.testing.assert_close(mine, seen[layer.layer_idx], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", CACHED)
def test_an_architecture_that_cannot_be_verified_says_so_and_no_other_does(name: str) -> None:
    model = tiny(name)
    with Capture(model, geometry_from_config(model.config)) as capture:
        layers = capture.run(ids())
        unverified = any("could not be verified" in note for note in capture.notes)
    assert unverified == (name in AFTER_ROTATION_ONLY)
    if unverified:
        assert "keys_post_rope" in {key for layer in layers for key in layer.tensors}


def test_hooks_are_gone_afterwards_and_after_an_error() -> None:
    model = tiny("llama")
    geometry = geometry_from_config(model.config)

    def hooks() -> int:
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())

    before, expected = hooks(), model(ids()).logits
    with Capture(model, geometry) as capture:
        assert hooks() > before
        capture.run(ids())
    assert hooks() == before
    with pytest.raises(IndexError), Capture(model, geometry) as capture:
        capture.run(torch.tensor([[10_000]]))
    assert hooks() == before
    torch.testing.assert_close(model(ids()).logits, expected, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["gpt2", "llama", "mistral", "deepseek_v2", "qwen3_next"])
def test_padding_at_the_right_changes_no_vector_of_a_real_token(name: str) -> None:
    model = tiny(name)
    geometry, row = geometry_from_config(model.config), ids(2)
    mask = torch.ones_like(row)
    mask[1, 15:] = 0
    with Capture(model, geometry) as capture:
        padded = capture.run(row * mask, mask)
        alone = capture.run(row[1:, :15])
    for layer, single in zip(padded, alone, strict=True):
        for key, tensor in layer.tensors.items():
            torch.testing.assert_close(tensor[1:, :, :15], single.tensors[key], rtol=1e-4, atol=1e-5)


def test_bfloat16_keys_are_verified_too() -> None:
    model = tiny("llama").to(torch.bfloat16)
    try:
        with Capture(model, geometry_from_config(model.config)) as capture:
            layers = capture.run(ids())
        assert not capture.notes
        assert all(layer.pairing == "half" for layer in layers)
        assert layers[0].tensors["keys_pre_rope"].dtype == torch.bfloat16
    finally:
        tiny("llama").to(torch.float32)


def test_only_the_layers_asked_for_are_captured() -> None:
    assert [layer.layer_idx for layer in captured("llama", layers=[2, 0])] == [2, 0]


@pytest.mark.parametrize(
    ("name", "layers", "says"),
    [
        ("llama", [7], "no layer 7"),
        ("llama", [-1], "no layer -1"),
        ("qwen3_next", [0], "linear attention"),
        ("llama", [], "is empty"),
    ],
)
def test_a_layer_that_does_not_exist_or_caches_nothing_is_named(name: str, layers: list[int], says: str) -> None:
    model = tiny(name)
    with pytest.raises(LayerError, match=says):
        Capture(model, geometry_from_config(model.config), layers=layers)


@pytest.mark.parametrize("name", NO_CACHE_NAMES)
def test_a_model_without_a_cache_is_refused(name: str) -> None:
    with pytest.raises(NoCacheError, match="no KV cache"):
        geometry_from_config(tiny(name).config)


@pytest.mark.parametrize("name", sorted(MULTI_AXIS & set(available())))
def test_rotation_by_several_axes_is_refused(name: str) -> None:
    with pytest.raises(UnsupportedArchitectureError, match="mRoPE"):
        geometry_from_config(tiny(name).config)
