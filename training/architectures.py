"""Architectures of the four bundled models, with the ratio of KV width to hidden size of the family that each represents.

| name | features | KV width / hidden size | of the family |
|---|---|---|---|
| ref-gpt2 | MHA, learned positions | 2.0 | GPT-2: 2.0 |
| ref-llama | GQA, RoPE | 0.5 | Llama-3-8B: 0.5 |
| ref-qwen2 | GQA, RoPE, biases on Q, K and V | 0.4 | Qwen2.5: 0.29 |
| ref-deepseek | MLA, latent and rotary key | 0.33 | DeepSeek-V2-Lite: 0.28 |
"""

from transformers import DeepseekV2Config, GPT2Config, LlamaConfig, PreTrainedConfig, Qwen2Config

MAX_LENGTH = 2048
_SHARED = {
    "vocab_size": 4096,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 0,
}


def config_of(name: str) -> PreTrainedConfig:
    """Return the configuration of a bundled model by its name."""
    match name:
        case "ref-gpt2":
            return GPT2Config(
                vocab_size=4096, n_positions=MAX_LENGTH, n_embd=192, n_layer=6, n_head=3,
                resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
            )  # fmt: skip
        case "ref-llama":
            return LlamaConfig(
                **_SHARED, hidden_size=256, intermediate_size=688, num_hidden_layers=7,
                num_attention_heads=8, num_key_value_heads=2, head_dim=32,
            )  # fmt: skip
        case "ref-qwen2":
            return Qwen2Config(
                **_SHARED, hidden_size=320, intermediate_size=640, num_hidden_layers=5,
                num_attention_heads=10, num_key_value_heads=2,
            )  # fmt: skip
        case "ref-deepseek":
            return DeepseekV2Config(
                **_SHARED, hidden_size=192, intermediate_size=512, num_hidden_layers=6,
                num_attention_heads=8, num_key_value_heads=8, kv_lora_rank=48, q_lora_rank=None,
                qk_nope_head_dim=32, qk_rope_head_dim=16, v_head_dim=32,
                n_routed_experts=2, num_experts_per_tok=1, n_shared_experts=1, first_k_dense_replace=6,
            )  # fmt: skip
    raise SystemExit(f"{name}: no such bundled model: use ref-gpt2, ref-llama, ref-qwen2 or ref-deepseek")
