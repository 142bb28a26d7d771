"""A calibration that broke the model is refused by layer and head, one that is too short by n_eff; nothing is fitted."""

import copy

import pytest
import torch

from eigencache.calibration.session import Session
from eigencache.errors import NonFiniteError, StatisticsError
from eigencache.fitting.pca import PCACalibration
from eigencache.fitting.pca_settings import PCASettings
from tiny_models import tiny


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    ("name", "projection", "says"),
    [
        ("llama", "model.layers.1.self_attn.v_proj.weight", "values: layer 1, head 1"),
        ("llama", "model.layers.1.self_attn.k_proj.weight", "keys_post_rope: layer 1, head 1"),
        ("gpt2", "transformer.h.2.attn.c_attn.bias", "values: layer 2, head 3"),
        ("deepseek_v2", "model.layers.1.self_attn.kv_a_layernorm.weight", "latent: layer 1, head 0"),
    ],
)
def test_activations_that_are_not_finite_are_located(name: str, projection: str, says: str, value: float, loaded, sequences):
    model = copy.deepcopy(tiny(name))
    with torch.no_grad():
        model.get_parameter(projection)[-1] = value
    with pytest.raises(NonFiniteError, match=f"{says} holds NaN or infinite values. Try `dtype` float32"):
        _ = PCACalibration(Session(loaded(model)), sequences(*(64,) * 4)).captured


@pytest.mark.parametrize(
    ("scope", "tokens", "where", "width"),
    [("head", 12, "layer 0", 16), ("layer", 24, "layer 0", 32), ("all", 48, "all", 96)],
)
@pytest.mark.parametrize("metric", ["frobenius", "fisher"])
def test_fewer_vectors_than_dimensions_are_refused_with_n_eff(
    scope, tokens, where, width, metric, loaded, sequences
) -> None:
    scarce = PCACalibration(Session(loaded("llama")), sequences(tokens), scopes=(scope,))
    independent = tokens - 7  # each vector's context of 8 tokens ends somewhere
    with pytest.raises(StatisticsError) as error:
        scarce.fit(PCASettings("v", scope, metric=metric))
    says = str(error.value)
    assert f"values, {where}" in says
    assert f"n_eff of {independent} independent vectors cannot carry a basis of {width} dimensions" in says
    assert "Use more calibration tokens" in says
