"""Every way into a model ends in the same spectra: bundled name, folder, GGUF file, 8-bit, spread over devices."""

import copy
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, LlamaConfig, PreTrainedModel

from eigencache import Probe, probe
from eigencache.errors import ModelError, TokenizerMismatchError
from eigencache.models.identity import fingerprint
from eigencache.models.load import BUNDLED, bundled_path, check_tokenizer, load
from stub_codecs import tiny_loaded
from tiny_models import tiny

pytestmark = pytest.mark.slow

FEW = {"tokens": 2048, "max_length": 128}


def ranks(result: Probe) -> list[float]:
    return [spectrum.effective_rank_eigen for spectrum in result.record.select(scope="layer")]


@pytest.mark.parametrize("name", BUNDLED)
def test_a_bundled_name_and_its_folder_are_the_same_model(name: str) -> None:
    by_name, by_folder = load(name), load(str(bundled_path(name)))
    assert fingerprint(by_name.model) == fingerprint(by_folder.model)
    assert by_name.geometry == by_folder.geometry
    assert sum(file.stat().st_size for file in bundled_path(name).glob("*.safetensors")) <= 12_000_000


@pytest.mark.parametrize(
    ("name", "attention", "ratio"),
    [("ref-gpt2", "MHA", 2.0), ("ref-llama", "GQA", 0.5), ("ref-qwen2", "GQA", 0.4), ("ref-deepseek", "MLA", 1 / 3)],
)
def test_a_bundled_model_has_the_width_of_its_family(name: str, attention: str, ratio: float) -> None:
    geometry = load(name).geometry
    assert geometry.attention == attention
    assert geometry.width_ratio == pytest.approx(ratio)


def test_biases_and_norms_are_told_by_the_modules() -> None:
    assert load("ref-qwen2").geometry.key_bias
    assert load("ref-qwen2").geometry.value_bias
    assert not load("ref-llama").geometry.key_bias
    assert not load("ref-llama").geometry.key_norm


def llama() -> PreTrainedModel:
    """A llama without biases over the bundled vocabulary, as GGUF knows it."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=256, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config).eval()


def write_gguf(model: PreTrainedModel, path: Path, *, stretched: bool = False) -> None:
    """The model in llama.cpp's format, its query and key rows in llama.cpp's order."""
    gguf = pytest.importorskip("gguf")
    config, weights = model.config, model.state_dict()
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    names = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    parts = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v"}
    parts |= {"self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up"}
    parts |= {"mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
    for layer in range(config.num_hidden_layers):
        names |= {f"model.layers.{layer}.{ours}": f"blk.{layer}.{theirs}" for ours, theirs in parts.items()}
    for ours, theirs in names.items():
        array = weights[f"{ours}.weight"].numpy()
        if theirs.endswith(("attn_q", "attn_k")):
            heads = array.shape[0] // config.head_dim
            array = array.reshape(heads, 2, -1, array.shape[1]).swapaxes(1, 2).reshape(array.shape)
        writer.add_tensor(f"{theirs}.weight", np.ascontiguousarray(array))
    if stretched:  # as files of Llama 3 are, and of models with YaRN
        writer.add_tensor("rope_freqs.weight", np.ones(config.head_dim // 2, dtype=np.float32))
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_file_gives_the_spectra_of_its_model(tmp_path: Path) -> None:
    model = llama()
    write_gguf(model, tmp_path / "tiny.gguf")
    tokenizer = AutoTokenizer.from_pretrained(bundled_path("ref-llama"))
    from_file = probe(str(tmp_path / "tiny.gguf"), "ref-llama", **FEW)
    assert ranks(from_file) == pytest.approx(ranks(probe(model, tokenizer, **FEW)), rel=1e-4)


def test_what_a_gguf_file_says_of_its_rotation_and_is_not_read_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name, stretched in (("plain.gguf", False), ("stretched.gguf", True)):
        write_gguf(llama(), tmp_path / name, stretched=stretched)
        load(str(tmp_path / name), tokenizer="ref-llama")
    (said,) = (record.getMessage() for record in caplog.records if record.name == "eigencache.models.load")
    assert said.startswith(
        "stretched.gguf: transformers does not read rope_freqs.weight, llama.rope.scaling.type and rotates"
    )


@pytest.mark.parametrize("content", [b"", b"GGUF", b"GGUF\x03\x00\x00\x00", b"GGUF" + bytes(60), b"no model at all"])
def test_a_gguf_file_that_is_cut_is_one_line(content: bytes, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    (tmp_path / "cut.gguf").write_bytes(content)
    with pytest.raises(ModelError, match=r"cut\.gguf: cannot be loaded: [^\n]+$"):
        load(str(tmp_path / "cut.gguf"))


def test_an_eight_bit_model_is_probed_like_any_other() -> None:
    pytest.importorskip("bitsandbytes")
    folder = bundled_path("ref-llama")
    options = {"quantization_config": BitsAndBytesConfig(load_in_8bit=True), "device_map": "cpu"}
    eight = probe(AutoModelForCausalLM.from_pretrained(folder, **options), AutoTokenizer.from_pretrained(folder), **FEW)
    assert "generic" not in eight.record.model.adapter
    assert ranks(eight) == pytest.approx(ranks(probe("ref-llama", **FEW)), rel=0.05)
    assert eight.record.model.sha256 != probe("ref-llama", **FEW).record.model.sha256


def test_a_model_may_be_spread_over_devices() -> None:
    pytest.importorskip("accelerate")
    spread = load("ref-gpt2", device="auto")
    assert fingerprint(spread.model) == fingerprint(load("ref-gpt2").model)


def test_a_fingerprint_is_of_the_model_wherever_it_lies(tmp_path: Path) -> None:
    elsewhere = tmp_path / "moved"
    shutil.copytree(bundled_path("ref-llama"), elsewhere)
    assert fingerprint(load(str(elsewhere)).model) == fingerprint(load("ref-llama").model)


def test_a_fingerprint_sees_one_changed_weight() -> None:
    model = copy.deepcopy(tiny("llama"))
    before = fingerprint(model)
    with torch.no_grad():
        model.model.layers[1].self_attn.k_proj.weight[0, 0] += 1
    assert fingerprint(model) != before == fingerprint(tiny("llama"))


def test_a_folder_that_is_no_model_and_a_missing_gguf_file_are_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"has no config\.json"):
        load(str(tmp_path))
    with pytest.raises(ModelError, match="no such GGUF file"):
        load(str(tmp_path / "absent.gguf"))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError, match="cannot be loaded"):
        load(str(tmp_path))


def test_a_tokenizer_with_more_entries_than_the_model_is_refused() -> None:
    with pytest.raises(TokenizerMismatchError, match="embeds only 128"):
        check_tokenizer(load("ref-llama").tokenizer, tiny("llama"))


@pytest.mark.parametrize(("name", "expected"), [("gpt2", 64), ("opt", 64), ("llama", None), ("deepseek_v2", None)])
def test_models_that_rotate_keys_have_no_learned_positions(name: str, expected: int | None) -> None:
    assert tiny_loaded(name).learned_positions == expected
