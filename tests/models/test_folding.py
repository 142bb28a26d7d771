"""Attention on coefficients equals attention after decoding, for every architecture with full attention and every rank."""

import pytest
import torch

from eigencache.calibration.session import Session
from eigencache.errors import CodecError, UnsupportedArchitectureError
from eigencache.fitting.pca import PCACalibration
from eigencache.fitting.pca_settings import PCASettings
from eigencache.geometry import geometry_from_config
from eigencache.models.folding import coefficient_cache, folded
from eigencache.models.load import LoadedModel
from stub_codecs import random_sequences
from tiny_models import tiny, token_ids

STANDARD = ("gpt2", "llama", "qwen2", "qwen3", "mistral", "phi3", "gpt_neox", "olmo2")
LATENT = ("deepseek_v2", "deepseek_v3")
_CALIBRATED: dict[str, PCACalibration] = {}


def calibrated(name: str) -> PCACalibration:
    if name not in _CALIBRATED:
        model = tiny(name)
        loaded = LoadedModel(name, model, None, geometry_from_config(model.config))  # type: ignore[arg-type]
        _CALIBRATED[name] = PCACalibration(Session(loaded), random_sequences(*(64,) * 24), scopes=("head", "layer"))
    return _CALIBRATED[name]


@torch.no_grad()
def logits(model, cache, pieces=(9, 1, 6, 8)) -> torch.Tensor:
    ids, start, found = token_ids(), 0, []
    for length in pieces:
        found.append(model(input_ids=ids[:, start : start + length], past_key_values=cache, use_cache=True).logits)
        start += length
    return torch.cat(found, 1)


CASES = [(name, target, metric) for name in STANDARD for target in ("v", "k", "kv") for metric in ("frobenius", "fisher")]
CASES += [(name, "latent", metric) for name in LATENT for metric in ("frobenius", "fisher")]


@pytest.mark.parametrize("rank", [4, 10])
@pytest.mark.parametrize(("name", "target", "metric"), CASES)
def test_folded_logits_are_those_of_decode_then_attend(name: str, target: str, metric: str, rank: int) -> None:
    one = calibrated(name)
    model = one.session.loaded.model
    if any(layer.window for layer in one.session.loaded.geometry.layers):
        with pytest.raises(UnsupportedArchitectureError, match="has a sliding window"):
            coefficient_cache(model, one.fit(PCASettings("v", frame="post")), decoded=True)
        return
    codec = one.fit(PCASettings(target, frame="post", metric=metric)).truncated(rank)  # type: ignore[arg-type]
    plain = model(input_ids=token_ids()).logits
    decoded = logits(model, coefficient_cache(model, codec, decoded=True))
    with folded(model, one.session.loaded.geometry, codec) as cache:
        found = logits(model, cache)
        held = cache.layers[0].values if target == "v" else cache.layers[0].keys
        assert held.shape[-1] == rank  # coefficients, not vectors
    torch.testing.assert_close(found, decoded, rtol=1e-3, atol=1e-3)
    assert float((decoded - plain).abs().max()) > 2e-2  # compression changes the logits
    assert torch.equal(model(input_ids=token_ids()).logits, plain)  # the model is restored


def test_the_model_is_as_before_after_an_error() -> None:
    one = calibrated("llama")
    model, before = one.session.loaded.model, tiny("llama").config._attn_implementation
    plain = model(input_ids=token_ids()).logits
    with pytest.raises(KeyboardInterrupt), folded(model, one.session.loaded.geometry, one.fit(PCASettings("v"))):
        raise KeyboardInterrupt
    assert model.config._attn_implementation == before
    assert torch.equal(model(input_ids=token_ids()).logits, plain)


def test_bases_that_cannot_be_folded_are_refused() -> None:
    one = calibrated("llama")
    with pytest.raises(CodecError, match="keys before rotation cannot be folded"):
        coefficient_cache(one.session.loaded.model, one.fit(PCASettings("k", frame="pre")), decoded=True)
    with pytest.raises(CodecError, match="spans heads cannot be folded"):
        coefficient_cache(one.session.loaded.model, one.fit(PCASettings("v", "layer")), decoded=True)
    latent = calibrated("deepseek_v2")
    codec = latent.fit(PCASettings("key_rope", frame="post"))
    with (
        pytest.raises(CodecError, match="rotary key cannot be folded"),
        folded(latent.session.loaded.model, latent.session.loaded.geometry, codec),
    ):
        pass


def test_folding_measured_on_text_is_rounding_beside_the_effect_of_compression() -> None:
    from eigencache.report.folding import folding_table
    from eigencache.studies.folding import measure_folding

    one = calibrated("llama")
    codec = one.fit(PCASettings("kv", frame="post")).truncated(8)
    result = measure_folding(one.session.loaded, random_sequences(20, 24), codec)
    assert result.rounding < 1e-3 * result.effect
    assert result.coefficients_nbytes * 2 == result.vectors_nbytes == 24 * 3 * 2 * 2 * 16 * 4
    assert folding_table("tiny", "float32", [result]).rows[0][4] == f"{result.coefficients_nbytes:,}"
