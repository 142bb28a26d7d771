"""Tiny, randomly initialized causal language models, one per supported architecture.

The settings are chosen to expose layout mistakes: grouped key heads, a head dimension that is not hidden / heads,
random biases and norm weights, windows shorter than the test sequence, partial rotation, soft caps, sinks, scaled
rotary frequencies and mixed layer types. `NAMES` lists every registered name, `available()` those that the installed
transformers can build; `tiny(name)` builds one.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel

VOCAB = 128
LENGTH = 24  # tokens in the test sequence; every window below is shorter
WINDOW = 8

Builder = Callable[[], PreTrainedModel]
_BUILDERS: dict[str, Builder] = {}
_MODEL_TYPES: dict[str, str] = {}

COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "max_position_embeddings": 64,
    "initializer_range": 0.15,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}

# Settings shared by families. `head_dim` is not hidden_size / num_attention_heads = 12 on purpose, also where the config
# does not declare it: the modeling code then reads it with getattr.
GQA: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
GQA4 = GQA | {"num_hidden_layers": 4}
MLA: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "kv_lora_rank": 20,
    "q_lora_rank": 12,
    "qk_nope_head_dim": 10,
    "qk_rope_head_dim": 8,
    "v_head_dim": 14,
    "attention_bias": True,
}
SPARSE_MLA = MLA | {
    "moe_intermediate_size": 16,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
}
INDEXED_MLA = SPARSE_MLA | {"index_topk": 12, "index_head_dim": 16, "index_n_heads": 2}
ONE_DENSE = ["dense", "sparse", "sparse"]
MIXED_WINDOWS = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
EXPERTS = {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2}
DELTA_NET = {"linear_key_head_dim": 8, "linear_value_head_dim": 12, "linear_num_key_heads": 2, "linear_num_value_heads": 4}
SMALL_MAMBA = {"mamba_d_state": 4, "mamba_expand": 2, "mamba_chunk_size": 8}

DEFAULT: dict[str, Any] = {"rope_type": "default", "rope_theta": 1000.0}  # a small base: every frequency turns visibly
HALF = DEFAULT | {"partial_rotary_factor": 0.5}
LINEAR = DEFAULT | {"rope_type": "linear", "factor": 2.0}
YARN = DEFAULT | {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LLAMA3 = DEFAULT | {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
# The switch to the long factors happens inside the test sequence (16 < LENGTH).
LONGROPE = HALF | {
    "rope_type": "longrope",
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [1.0, 1.5, 2.0, 3.0],
}


def _randomize(model: PreTrainedModel) -> None:
    """Move every bias, norm weight, sink and router correction away from its default, to make each one visible."""
    generator = torch.Generator().manual_seed(1)
    biases = [
        (name, buffer) for name, buffer in model.named_buffers() if name.endswith("bias") and buffer.is_floating_point()
    ]
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *biases]:
            constant = torch.all(tensor == tensor.flatten()[0])
            if constant or tensor.ndim <= 1 or name.endswith("bias"):
                tensor.add_(0.2 * torch.randn(tensor.shape, generator=generator).to(tensor))


def _config(model_type: str, settings: dict[str, Any]) -> PreTrainedConfig:
    """Return a configuration with the settings common to all models, which `settings` may override."""
    # A copy, because configurations write defaults into the dictionaries they are given.
    return CONFIG_MAPPING[model_type](**copy.deepcopy(COMMON | settings))


def built(model_type: str, model_class: str, settings: dict[str, Any]) -> PreTrainedModel:
    """Build, seed and randomize one model, in float32 and evaluation mode."""
    config = _config(model_type, settings)
    factory = getattr(transformers, model_class)
    build = factory.from_config if model_class.startswith("Auto") else factory._from_config
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build(config, dtype=torch.float32)
    _randomize(model)
    return model.eval()


def _add(name: str, model_type: str | None = None, /, model_class: str = "AutoModelForCausalLM", **settings: Any) -> None:
    """Register one architecture under a name; the model type defaults to the name."""
    _MODEL_TYPES[name] = model_type or name
    _BUILDERS[name] = functools.partial(built, model_type or name, model_class, settings)


# Learned positions, ALiBi and the older fused layouts
_GPT: dict[str, Any] = {"n_embd": 48, "n_layer": 3, "n_head": 4, "n_positions": 64}
_add("gpt2", **_GPT)
_add("gpt_bigcode", **_GPT, multi_query=True)
_add(
    "opt",
    hidden_size=48,
    ffn_dim=64,
    num_hidden_layers=3,
    num_attention_heads=4,
    word_embed_proj_dim=32,
    init_std=0.15,
    pad_token_id=1,
)
_add("bloom", hidden_size=48, n_layer=3, n_head=4)
_add("mpt", d_model=48, n_layers=3, n_heads=4, max_seq_len=64, attn_config={"clip_qkv": 0.8})
_add("gptj", **(_GPT | {"n_embd": 64}), rotary_dim=8)
_add("codegen", **(_GPT | {"n_embd": 64}), n_ctx=64, rotary_dim=8)
_NEOX: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
_add("gpt_neox", **_NEOX, rope_parameters=DEFAULT | {"partial_rotary_factor": 0.25}, use_parallel_residual=True)
_add("gpt_neox_sequential", "gpt_neox", **_NEOX, rope_parameters=HALF, use_parallel_residual=False)
_FALCON: dict[str, Any] = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "bias": True}
_add("falcon", **_FALCON, rope_parameters=DEFAULT, multi_query=True)
_add("falcon_new", "falcon", **_FALCON, rope_parameters=DEFAULT, new_decoder_architecture=True, num_kv_heads=2)
_add("falcon_alibi", "falcon", **_FALCON, alibi=True, multi_query=False, parallel_attn=False)

# Llama and its relatives
_add("llama", **GQA, rope_parameters=DEFAULT, attention_bias=True, mlp_bias=True)
_add("llama_yarn", "llama", **GQA, rope_parameters=YARN)
_add("llama3", "llama", **GQA, rope_parameters=LLAMA3)
_add(
    "llama_dynamic",
    "llama",
    **GQA,
    rope_parameters=DEFAULT | {"rope_type": "dynamic", "factor": 2.0},
    max_position_embeddings=16,
)
_add("mistral", **GQA, rope_parameters=DEFAULT, sliding_window=WINDOW)
_add("mixtral", **GQA, rope_parameters=DEFAULT, sliding_window=WINDOW, num_local_experts=4, num_experts_per_tok=2)
_SWITCHED = {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1}
_add("qwen2", **GQA, **_SWITCHED, rope_parameters=DEFAULT)
_add("qwen3", **GQA, **_SWITCHED, rope_parameters=DEFAULT, attention_bias=True)
_add("qwen3_moe", **GQA, **_SWITCHED, **EXPERTS, rope_parameters=DEFAULT, attention_bias=True, mlp_only_layers=[1])
_add("gemma", **(GQA | {"num_key_value_heads": 1}), rope_parameters=DEFAULT, attention_bias=True)
_CAPPED = {
    "query_pre_attn_scalar": 20,
    "sliding_window": WINDOW,
    "final_logit_softcapping": 3.0,
    "attn_logit_softcapping": 2.0,
    "layer_types": MIXED_WINDOWS,
}
_add("gemma2", **GQA4, **_CAPPED, rope_parameters=DEFAULT, attention_bias=True)
_TWO_ROPES = {"sliding_attention": DEFAULT, "full_attention": LINEAR | {"rope_theta": 5000.0}}
_add("gemma3_text", **GQA4, **_CAPPED, rope_parameters=_TWO_ROPES, attention_bias=True)
_SHARED_KV: dict[str, Any] = GQA4 | {
    "num_kv_shared_layers": 2,
    "sliding_window": WINDOW,
    "final_logit_softcapping": 3.0,
    "layer_types": MIXED_WINDOWS,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": VOCAB,
}
_add(
    "gemma3n_text",
    **_SHARED_KV,
    rope_parameters=_TWO_ROPES,
    laurel_rank=4,
    altup_num_inputs=2,
    activation_sparsity_pattern=[0.5, 0.0, 0.0, 0.0],
)
_add(
    "gemma4_text",
    **_SHARED_KV,
    global_head_dim=24,
    rope_parameters={
        "sliding_attention": DEFAULT,
        "full_attention": DEFAULT | {"rope_type": "proportional", "partial_rotary_factor": 0.5},
    },
)
_add("phi", **(GQA | {"hidden_size": 64}), rope_parameters=HALF, qk_layernorm=True)
_add("phi3", **GQA, rope_parameters=HALF, sliding_window=WINDOW)
_add("phi3_longrope", "phi3", **(GQA | {"hidden_size": 64}), rope_parameters=LONGROPE, original_max_position_embeddings=16)
_add(
    "gpt_oss",
    **GQA4,
    rope_parameters=YARN | {"truncate": False},
    sliding_window=WINDOW,
    num_local_experts=4,
    num_experts_per_tok=2,
)
_add("stablelm", **(GQA | {"hidden_size": 64}), rope_parameters=HALF, use_qkv_bias=True, qk_layernorm=True)
_add("starcoder2", **GQA, rope_parameters=DEFAULT, sliding_window=WINDOW)
_add("cohere", **GQA, logit_scale=0.8, rope_parameters=DEFAULT, attention_bias=True, use_qk_norm=True)
_add(
    "cohere2",
    **GQA4,
    logit_scale=0.8,
    rope_parameters=DEFAULT,
    attention_bias=True,
    sliding_window=WINDOW,
    layer_types=MIXED_WINDOWS,
)
_add("glm", **GQA, rope_parameters=HALF)
_add("glm4", **GQA, rope_parameters=HALF)
_add("olmo", **GQA, rope_parameters=DEFAULT, attention_bias=True, clip_qkv=0.5)
_add("olmo2", **GQA, rope_parameters=DEFAULT, attention_bias=True)
_add(
    "granite",
    **GQA,
    rope_parameters=DEFAULT,
    attention_bias=True,
    mlp_bias=True,
    embedding_multiplier=2.0,
    logits_scaling=1.5,
    residual_multiplier=0.5,
    attention_multiplier=0.4,
)
_add(
    "smollm3",
    **GQA4,
    rope_parameters=DEFAULT,
    attention_bias=True,
    no_rope_layers=[1, 0, 1, 0],
    use_sliding_window=True,
    sliding_window=WINDOW,
)
_add(
    "llama4_text",
    **GQA4,
    rope_parameters=DEFAULT,
    attention_bias=True,
    intermediate_size_mlp=48,
    num_local_experts=4,
    interleave_moe_layer_step=2,
    no_rope_layers=[1, 0, 1, 0],
    attention_chunk_size=WINDOW,
    floor_scale=4,
)
_add("exaone4", **GQA4, rope_parameters=DEFAULT, sliding_window=WINDOW, sliding_window_pattern=2, layer_types=MIXED_WINDOWS)
_add("ernie4_5", **GQA, rope_parameters=DEFAULT, use_bias=True)
_add("hunyuan_v1_dense", **GQA, rope_parameters=DEFAULT, attention_bias=True)
_add("nanochat", **GQA, rope_parameters=DEFAULT, attention_bias=True)

# Multi-head latent attention
_add("deepseek_v2", **SPARSE_MLA, rope_parameters=DEFAULT, first_k_dense_replace=1)
_add(
    "deepseek_v2_no_q_lora",
    "deepseek_v2",
    **(SPARSE_MLA | {"q_lora_rank": None}),
    first_k_dense_replace=1,
    rope_parameters=YARN | {"mscale": 1.0, "mscale_all_dim": 0.7},
)
_add("deepseek_v3", **SPARSE_MLA, rope_parameters=DEFAULT, first_k_dense_replace=1)
_add(
    "deepseek_v3_half",
    "deepseek_v3",
    **(SPARSE_MLA | {"q_lora_rank": None}),
    rope_interleave=False,
    first_k_dense_replace=1,
    rope_parameters=YARN | {"mscale": 1.0, "mscale_all_dim": 0.7},
)
_add("deepseek_v32", **INDEXED_MLA, rope_parameters=DEFAULT, first_k_dense_replace=1)
_add("glm4_moe_lite", **SPARSE_MLA, rope_parameters=DEFAULT, mlp_layer_types=ONE_DENSE)
_LONGCAT = {k: v for k, v in MLA.items() if k not in ("num_hidden_layers", "intermediate_size")}
_add(
    "longcat_flash",
    **_LONGCAT,
    num_layers=2,
    ffn_hidden_size=64,
    moe_topk=2,
    n_routed_experts=4,
    zero_expert_num=2,
    expert_ffn_hidden_size=16,
    head_dim=8,
    rope_parameters=DEFAULT,
)
_add("minicpm3", **MLA, rope_parameters=DEFAULT, dim_model_base=32)
_add("youtu", **MLA, rope_parameters=DEFAULT)
_add(
    "mistral4",
    None,
    "Mistral4ForCausalLM",
    **SPARSE_MLA,
    first_k_dense_replace=1,
    rope_parameters=YARN | {"llama_4_scaling_beta": 0.1},
)
_add("axk1", **SPARSE_MLA, rope_parameters=DEFAULT, mlp_layer_types=ONE_DENSE)
_add("axk2", **INDEXED_MLA, rope_parameters=DEFAULT, mlp_layer_types=ONE_DENSE, gated_norm_rank=4)
_add(
    "glm_moe_dsa", **INDEXED_MLA, rope_parameters=DEFAULT, first_k_dense_replace=1, indexer_types=["full", "shared", "full"]
)
# The sliding layers have their own sizes; head_dim must be qk_nope_head_dim + qk_rope_head_dim.
_SLIDING_MLA = {
    "head_dim": 18,
    "swa_num_attention_heads": 2,
    "swa_num_key_value_heads": 2,
    "swa_q_lora_rank": 10,
    "swa_kv_lora_rank": 16,
    "swa_head_dim": 16,
    "swa_qk_nope_head_dim": 12,
    "swa_v_head_dim": 6,
}
_add(
    "dots3_note_text",
    **INDEXED_MLA,
    **_SLIDING_MLA,
    layer_types=["indexed_attention", "sliding_attention", "indexed_attention"],
    rope_parameters=DEFAULT,
    mlp_layer_types=ONE_DENSE,
    sliding_window=WINDOW,
    shared_experts_intermediate_size=16,
)
_add(
    "hy_v4",
    **INDEXED_MLA,
    rope_parameters=DEFAULT,
    mlp_layer_types=ONE_DENSE,
    indexer_types=["full", "shared", "full"],
    hc_mult=2,
)
_LINEAR_MLA = SPARSE_MLA | {"num_hidden_layers": 4, "num_local_experts": 4}
_HYBRID_TYPES = ["linear_attention", "full_attention", "linear_attention", "full_attention"]
_add("kimi_linear", **_LINEAR_MLA, layer_types=_HYBRID_TYPES, linear_head_dim=8, linear_num_heads=4)
_add("bailing_hybrid", **_LINEAR_MLA, rope_parameters=DEFAULT, head_dim=16, layer_group_size=2, first_k_dense_replace=1)

_VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "depth": 1,
    "num_attention_heads": 2,
    "num_heads": 2,
    "out_hidden_size": 48,
}
_add(
    "glm5_next",
    None,
    "Glm5NextForConditionalGeneration",
    vision_config=_VISION,
    text_config=INDEXED_MLA
    | COMMON
    | {
        "num_hidden_layers": 4,
        "qk_rope_head_dim": 0,
        "layer_types": ["linear_attention", "full_attention", "full_attention", "linear_attention"],
        "indexer_types": ["full", "full", "shared", "full"],
        "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
        "linear_head_dim": 8,
        "linear_num_heads": 4,
        "hc_mult": 2,
        "index_kpool": 4,
    },
)
_add(
    "mistral_large4",
    None,
    "MistralLarge4ForConditionalGeneration",
    vision_config=_VISION | {"model_type": "pixtral"},
    text_config=INDEXED_MLA
    | COMMON
    | {
        "model_type": "mistral_large4_text",
        "num_hidden_layers": 4,
        "first_k_dense_replace": 1,
        "rope_parameters": YARN,
        "no_rope_layers": [1, 0, 1, 1],
        "kv_source_layers": [0, 1, 2, 2],
        "final_logit_softcapping": 3.0,
    },
)

# Hybrids of attention with linear attention, state spaces or convolutions
_add(
    "qwen3_next",
    **GQA4,
    **DELTA_NET,
    **EXPERTS,
    rope_parameters=HALF,
    attention_bias=True,
    layer_types=_HYBRID_TYPES,
    shared_expert_intermediate_size=16,
)
_add(
    "qwen3_5_text",
    **GQA4,
    **DELTA_NET,
    layer_types=_HYBRID_TYPES,
    attention_bias=True,
    rope_parameters=HALF | {"mrope_section": [2, 1, 1], "mrope_interleaved": True},
)
_add(
    "jamba",
    **GQA4,
    num_experts=4,
    num_experts_per_tok=2,
    attn_layer_period=2,
    attn_layer_offset=1,
    mamba_d_state=4,
    mamba_dt_rank=4,
)
_add(
    "falcon_h1",
    **GQA,
    **SMALL_MAMBA,
    rope_parameters=DEFAULT,
    attention_bias=True,
    mamba_d_ssm=48,
    mamba_n_heads=4,
    key_multiplier=0.5,
    attention_in_multiplier=0.8,
    attention_out_multiplier=1.2,
    ssm_in_multiplier=0.7,
)
_add("lfm2", **GQA4, rope_parameters=DEFAULT, layer_types=["conv", "full_attention", "conv", "full_attention"])
_add(
    "nemotron_h",
    **{k: v for k, v in GQA.items() if k != "num_hidden_layers"},
    attention_bias=True,
    layers_block_type=["linear_attention", "full_attention", "moe", "mlp", "full_attention"],
    ssm_state_size=4,
    mamba_num_heads=4,
    mamba_head_dim=8,
    n_groups=2,
    chunk_size=8,
    n_routed_experts=4,
    moe_intermediate_size=16,
    moe_shared_expert_intermediate_size=16,
)
_add(
    "bamba", **GQA4, **SMALL_MAMBA, rope_parameters=DEFAULT, attention_bias=True, attn_layer_indices=[1, 3], mamba_n_heads=4
)
_ZAMBA2: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
    "mamba_d_state": 4,
    "n_mamba_heads": 4,
    "chunk_size": 8,
}
_add("zamba2", **_ZAMBA2, num_mem_blocks=1)
_ADAPTER = {"use_shared_attention_adapter": True, "adapter_rank": 4}
_add("zamba2_adapter", "zamba2", **_ZAMBA2, **_ADAPTER, num_mem_blocks=2, use_mem_rope=True, rope_parameters=DEFAULT)
_add(
    "recurrent_gemma",
    hidden_size=64,
    intermediate_size=64,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    attention_window_size=WINDOW,
    attention_bias=True,
    rope_parameters=HALF,
)

# No KV cache
_add("mamba", hidden_size=48, state_size=4, num_hidden_layers=2)
_add("mamba2", hidden_size=48, state_size=4, num_hidden_layers=2, num_heads=4, head_dim=24, n_groups=2, chunk_size=8)


NAMES: tuple[str, ...] = tuple(_BUILDERS)
MLA_NAMES: tuple[str, ...] = (
    "deepseek_v2",
    "deepseek_v2_no_q_lora",
    "deepseek_v3",
    "deepseek_v3_half",
    "deepseek_v32",
    "glm4_moe_lite",
    "longcat_flash",
    "minicpm3",
    "youtu",
    "mistral4",
    "axk1",
    "axk2",
    "glm_moe_dsa",
    "dots3_note_text",
    "hy_v4",
    "kimi_linear",
    "bailing_hybrid",
    "glm5_next",
    "mistral_large4",
)
# Attention beside linear attention, state spaces, convolutions or recurrences; only falcon_h1 has keys in every layer.
HYBRID_NAMES: tuple[str, ...] = (
    "kimi_linear",
    "bailing_hybrid",
    "glm5_next",
    "qwen3_next",
    "qwen3_5_text",
    "jamba",
    "falcon_h1",
    "lfm2",
    "nemotron_h",
    "bamba",
    "zamba2",
    "zamba2_adapter",
    "recurrent_gemma",
)
# Some layers read the keys that an earlier layer stored.
SHARED_KV_NAMES: tuple[str, ...] = ("gemma3n_text", "gemma4_text", "mistral_large4")
NO_CACHE_NAMES: tuple[str, ...] = ("mamba", "mamba2")
# No layer rotates its keys: learned positions, ALiBi or no positions at all.
NO_ROTATION_NAMES: tuple[str, ...] = (
    "gpt2",
    "gpt_bigcode",
    "opt",
    "bloom",
    "mpt",
    "falcon_alibi",
    "jamba",
    "nemotron_h",
    "zamba2",
    "kimi_linear",
    "glm5_next",
)
# Some layers rotate their keys and others store them as projected.
MIXED_ROTATION_NAMES: tuple[str, ...] = ("cohere2", "exaone4", "smollm3", "llama4_text", "mistral_large4")
# The cache is filled when the caller passes one, but the output does not carry it.
NO_RETURNED_CACHE_NAMES: tuple[str, ...] = ("recurrent_gemma",)
_NO_TEXT_CLASS = "no causal language model class takes the text configuration alone; the registry builds {} instead"
NOT_BUILDABLE: dict[str, str] = {
    "glm5_next_text": _NO_TEXT_CLASS.format("glm5_next"),
    "mistral_large4_text": _NO_TEXT_CLASS.format("mistral_large4"),
}


def available() -> tuple[str, ...]:
    """Return the names whose configuration class exists in the installed transformers."""
    return tuple(name for name in NAMES if _MODEL_TYPES[name] in CONFIG_MAPPING)


@functools.cache
def tiny(name: str) -> PreTrainedModel:
    """Return the tiny model registered under a name; it is shared between callers, who must not change it."""
    return _BUILDERS[name]()


def token_ids(batch: int = 2, length: int = LENGTH) -> torch.Tensor:
    """Return reproducible input ids that avoid the lowest ids, which some models reserve."""
    return torch.randint(4, VOCAB, (batch, length), generator=torch.Generator().manual_seed(2))
