"""A saved codec is refused for a model with another RoPE, dtype or weights than it was fitted on, and the error names it."""

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from eigencache.calibration.session import Session
from eigencache.codec.saved.folder import SavedCodec, load_codec, save_codec
from eigencache.errors import CodecError
from eigencache.fitting.pca import PCACalibration
from eigencache.fitting.pca_settings import PCASettings, targets_of
from eigencache.fitting.provenance import fitting_of
from eigencache.geometry import geometry_from_config
from eigencache.models.codec_check import check_belongs
from eigencache.models.load import LoadedModel
from eigencache.models.rope_detection import rotations_of
from eigencache.spectral.rope import rope_sha256
from stub_codecs import random_sequences, tiny_loaded
from tiny_models import DEFAULT, LLAMA3, YARN, tiny

USUAL = ("gpt2", "llama", "qwen2", "gemma3_text", "deepseek_v2")
ROPES = {
    "theta": DEFAULT | {"rope_theta": 10_000.0},
    "linear": DEFAULT | {"rope_type": "linear", "factor": 2.0},
    "yarn": YARN,
    "llama3": LLAMA3,
}


def saved(name: str, folder: Path) -> SavedCodec:
    calibration = PCACalibration(Session(tiny_loaded(name)), random_sequences(*(64,) * 16))
    settings = PCASettings(targets_of(calibration.session.loaded)[0])
    codec = calibration.fit(settings)
    save_codec(folder, codec, *fitting_of(codec, settings, calibration))
    return load_codec(folder)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> SavedCodec:
    return saved("llama", tmp_path_factory.mktemp("llama") / "codec")


def with_rope(parameters: dict) -> PreTrainedModel:
    """Return a model with the same weights and another rotation."""
    config = copy.deepcopy(tiny("llama").config)
    config.rope_parameters = dict(parameters)
    model = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(tiny("llama").state_dict())
    return model.eval()


def of(model: PreTrainedModel, name: str = "other") -> LoadedModel:
    return LoadedModel(name, model, None, geometry_from_config(model.config))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", USUAL)
def test_a_codec_belongs_to_the_model_it_was_fitted_on(name: str, tmp_path: Path) -> None:
    check_belongs(saved(name, tmp_path / "codec"), of(copy.deepcopy(tiny(name))))


@pytest.mark.parametrize("rope", ROPES)
def test_another_rope_is_said_before_another_model(rope: str, llama: SavedCodec) -> None:
    with pytest.raises(CodecError) as error:
        check_belongs(llama, of(with_rope(ROPES[rope])))
    says = str(error.value)
    assert says.startswith(f"{llama.folder}: fitted on llama; this is other, which rotates keys differently (RoPE ")
    assert f" instead of {llama.card.origin.rope_sha256[:12]})" in says
    assert "load llama as it was for the fit, or fit a codec on this model" in says


def test_the_rope_hash_follows_the_configuration_and_not_the_machine() -> None:
    hashes = {name: rope_sha256(rotations_of(of(with_rope(parameters)))) for name, parameters in ROPES.items()}
    hashes["default"] = rope_sha256(rotations_of(of(with_rope(DEFAULT))))
    assert len(set(hashes.values())) == len(hashes)
    found = rotations_of(tiny_loaded("llama"))
    elsewhere = {i: replace(r, frequencies=r.frequencies * (1 + 1e-6)) for i, r in found.items()}
    exact = replace(found[0], frequencies=1000.0 ** (-torch.arange(8, dtype=torch.float64) / 8))
    assert {rope_sha256(r) for r in (found, elsewhere, dict.fromkeys(range(3), exact))} == {hashes["default"]}


def test_other_weights_are_refused_naming_both_models(llama: SavedCodec) -> None:
    model = copy.deepcopy(tiny("llama"))
    with torch.no_grad():
        model.model.layers[1].self_attn.v_proj.weight[0, 0] += 1
    with pytest.raises(CodecError) as error:
        check_belongs(llama, of(model))
    says = str(error.value)
    assert f"fitted on llama ({llama.card.origin.model_sha256[:12]}), this is other (" in says
    assert "load the model it was fitted on, or fit a codec on this model" in says


def test_another_dtype_is_named_with_the_option_that_mends_it(llama: SavedCodec) -> None:
    with pytest.raises(CodecError, match="in float32, other is loaded in bfloat16: use `dtype` float32, or fit"):
        check_belongs(llama, of(copy.deepcopy(tiny("llama")).to(torch.bfloat16)))
