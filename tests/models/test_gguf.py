"""A model loaded from a GGUF file has the spectra of the original; an unread rotation is reported."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedModel

from eigencache import Probe, probe
from eigencache.errors import ModelError
from eigencache.models.load import load
from eigencache.models.sources import bundled_path

pytestmark = pytest.mark.slow

FEW = {"tokens": 2048, "max_length": 128}


def ranks(result: Probe) -> list[float]:
    return [spectrum.effective_rank_eigen for spectrum in result.record.select(scope="layer")]


def llama() -> PreTrainedModel:
    """Return a llama without biases over the bundled vocabulary, an architecture that GGUF supports."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=256, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config).eval()


def write_gguf(
    model: PreTrainedModel, path: Path, *, frequency_factor: float | None = None, scaling: str | None = None
) -> None:
    """Write a model in the format of llama.cpp, with the rows of queries and keys in its order."""
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
    if frequency_factor is not None:  # like files of Llama 3
        factors = np.ones(config.head_dim // 2, dtype=np.float32)
        factors[-1] = frequency_factor
        writer.add_tensor("rope_freqs.weight", factors)
    if scaling is not None:  # like files of models with YaRN
        writer.add_rope_scaling_type(gguf.RopeScalingType(scaling))
        writer.add_rope_scaling_factor(1.0 if scaling == "none" else 4.0)
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


def test_the_header_of_a_gguf_file_is_parsed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gguf = pytest.importorskip("gguf")
    write_gguf(llama(), tmp_path / "tiny.gguf")
    parsed, before = [], AutoConfig.from_pretrained
    monkeypatch.setattr(
        AutoConfig, "from_pretrained", lambda *args, **kwargs: parsed.append(args) or before(*args, **kwargs)
    )
    readers, reader = [], gguf.GGUFReader
    monkeypatch.setattr(gguf, "GGUFReader", lambda *args: readers.append(args) or reader(*args))
    counted = gguf.GGUFReader
    load(str(tmp_path / "tiny.gguf"), tokenizer="ref-llama")
    assert len(readers) == 1 and gguf.GGUFReader is counted
    assert [str(tmp_path)] == [source for source, *_ in parsed if source == str(tmp_path)]


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({"frequency_factor": 8.0}, r"\(rope_freqs\.weight\)"),
        ({"scaling": "yarn"}, r"\(llama\.rope\.scaling\.type = yarn, llama\.rope\.scaling\.factor = 4\.0\)"),
    ],
)
def test_a_rotation_that_would_not_be_read_is_refused(options: dict[str, Any], found: str, tmp_path: Path) -> None:
    write_gguf(llama(), tmp_path / "long.gguf", **options)
    with pytest.raises(ModelError, match=rf"long\.gguf: scales its rotation {found}, which transformers does not read"):
        load(str(tmp_path / "long.gguf"), tokenizer="ref-llama")


def test_a_rotation_that_is_scaled_by_one_is_read(tmp_path: Path) -> None:
    write_gguf(llama(), tmp_path / "plain.gguf", frequency_factor=1.0, scaling="none")
    assert load(str(tmp_path / "plain.gguf"), tokenizer="ref-llama").geometry.rope is not None


def test_a_gguf_file_whose_end_is_missing_says_so(tmp_path: Path) -> None:
    write_gguf(llama(), tmp_path / "whole.gguf")
    data = (tmp_path / "whole.gguf").read_bytes()
    (tmp_path / "cut.gguf").write_bytes(data[: len(data) // 2])
    with pytest.raises(ModelError, match=r"cut\.gguf: cannot be loaded: it is not a whole GGUF file\. Download it again\.$"):
        load(str(tmp_path / "cut.gguf"), tokenizer="ref-llama")
    (tmp_path / "head.gguf").write_bytes(data[:100])
    with pytest.raises(
        ModelError, match=r"head\.gguf: cannot be loaded: it (ends within|is not a whole).*Download it again\.$"
    ):
        load(str(tmp_path / "head.gguf"), tokenizer="ref-llama")


@pytest.mark.parametrize("content", [b"", b"GGUF", b"GGUF\x03\x00\x00\x00", b"GGUF" + bytes(60), b"no model at all"])
def test_a_gguf_file_that_is_cut_is_one_line(content: bytes, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    (tmp_path / "cut.gguf").write_bytes(content)
    with pytest.raises(ModelError, match=r"cut\.gguf: cannot be loaded: [^\n]+$"):
        load(str(tmp_path / "cut.gguf"))
