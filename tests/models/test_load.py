"""A model loaded by bundled name, from a folder, in 8 bits or spread over devices has the same spectra."""

import copy
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from eigencache import Probe, probe
from eigencache.errors import ModelError, TokenizerMismatchError
from eigencache.models.identity import fingerprint
from eigencache.models.load import check_device, check_tokenizer, load
from eigencache.models.sources import BUNDLED, bundled_path
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


def test_a_misspelled_name_is_answered_with_the_closest_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(bundled_path("ref-llama"), tmp_path / "mine" / "Tiny-Llama")
    (tmp_path / "mine" / "tiny-notes").mkdir()  # not a model
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)  # OWNER/NAME is looked up in the local cache only
    with pytest.raises(ModelError, match=r"^ref-lama: no such folder, .*\(did you mean ref-llama\?\)"):
        load("ref-lama")
    with pytest.raises(ModelError, match=r"\(did you mean \.?/?mine/Tiny-Llama\?\)"):
        load("./mine/tiny-lama")
    with pytest.raises(ModelError, match=r"^mine/tiny-lama: cannot be loaded \(did you mean mine/Tiny-Llama\?\)"):
        load("mine/tiny-lama")
    with pytest.raises(ModelError) as caught:
        load("./mine/entirely-else")
    assert "did you mean" not in str(caught.value)


def test_a_cuda_device_that_this_machine_lacks_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    check_device("cuda:1")
    with pytest.raises(ModelError, match="`device` cuda:2: this machine has 2 CUDA devices, counted from cuda:0"):
        check_device("cuda:2")
