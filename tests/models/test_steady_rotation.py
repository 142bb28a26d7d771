"""Texts that a model rotates with other frequencies, or that exceed the fit of a codec, lose nothing without an error."""

import logging
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import DynamicCache, PreTrainedModel

from eigencache.api import CacheCodec
from eigencache.calibration.calibration_set import CalibrationSet, calibration_length
from eigencache.calibration.session import Session
from eigencache.errors import CodecError, StatisticsError
from eigencache.fitting.eigen import EigenSettings
from eigencache.fitting.fit import Goal, fit_codec
from eigencache.fitting.live import fit_live
from eigencache.fitting.pca import PCACalibration
from eigencache.geometry import geometry_from_config
from eigencache.models.live_cache.cache import CompressedCache
from eigencache.models.load import LoadedModel
from eigencache.models.rope_detection import rotations_of, steady_tokens
from live_codecs import cached_by, fine_codec, long_ids, long_model
from stub_codecs import random_sequences, tiny_loaded
from tiny_models import DEFAULT, GQA, LONGROPE, built, tiny

pytestmark = pytest.mark.versions

SWITCH = 40
KINDS: dict[str, dict[str, Any]] = {
    "longrope": LONGROPE | {"original_max_position_embeddings": SWITCH},
    "dynamic": DEFAULT | {"rope_type": "dynamic", "factor": 2.0},
}


def changing(kind: str) -> PreTrainedModel:
    """A new model whose rotation changes beyond 40 tokens."""
    more = GQA | {"rope_parameters": KINDS[kind], "hidden_size": 64}
    if kind == "longrope":
        return built(
            "phi3",
            "AutoModelForCausalLM",
            more | {"original_max_position_embeddings": SWITCH, "max_position_embeddings": 256},
        )
    return built("llama", "AutoModelForCausalLM", more | {"max_position_embeddings": SWITCH})


def loaded(kind: str) -> LoadedModel:
    model = changing(kind)
    return LoadedModel(kind, model, None, geometry_from_config(model.config))  # type: ignore[arg-type]


# Configurations


@pytest.mark.parametrize("kind", KINDS)
def test_keys_of_the_same_tokens_change_one_token_behind_the_steady_ones(kind: str) -> None:
    model, ids = changing(kind), long_ids(1, SWITCH + 1)
    assert steady_tokens(model.config) == SWITCH
    first = {n: cached_by(model, ids[:, :n]).layers[0].keys[:, :, :9] for n in (SWITCH - 1, SWITCH, SWITCH + 1)}
    torch.testing.assert_close(first[SWITCH - 1], first[SWITCH])
    assert float((first[SWITCH + 1] - first[SWITCH]).abs().max()) > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_the_rotation_of_a_codec_is_that_of_steady_texts(kind: str) -> None:
    one = loaded(kind)
    cached_by(one.model, long_ids(1, 9))  # a short text restores the frequencies of short texts
    expected = one.model.model.rotary_emb.original_inv_freq.double()
    cached_by(one.model, long_ids(1, SWITCH + 1))
    assert not torch.allclose(one.model.model.rotary_emb.inv_freq.double(), expected, rtol=1e-3)
    for rotation in rotations_of(one).values():
        torch.testing.assert_close(rotation.frequencies, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3_text", "deepseek_v2"])
def test_others_rotate_texts_of_any_length_alike(name: str) -> None:
    assert steady_tokens(tiny(name).config) is None


def test_the_shortest_of_several_kinds_of_layers_counts() -> None:
    kinds = {"full_attention": KINDS["longrope"], "sliding_attention": KINDS["dynamic"], "other": DEFAULT}
    config = SimpleNamespace(rope_parameters=kinds, max_position_embeddings=30)
    config.get_text_config = lambda decoder: config
    assert steady_tokens(config) == 30


# Fitting


@pytest.mark.parametrize("kind", KINDS)
def test_longer_sequences_are_refused_before_anything_is_measured(kind: str) -> None:
    one, longer = loaded(kind), random_sequences(*[SWITCH + 1] * 20)
    for study in (CalibrationSet, PCACalibration):
        with pytest.raises(StatisticsError, match=f"41 tokens: beyond 40 tokens {kind} .*`max_length` 40"):
            study(Session(one), longer)
    assert calibration_length(one) == SWITCH


# Caches of longer texts


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_cache_of_a_longer_text_is_not_encoded_unless_forced(kind: str) -> None:
    one = loaded(kind)
    fitted = fit_codec(Session(one), random_sequences(*[32] * 64), EigenSettings(text=False), Goal.of(bits=6))
    codec = CacheCodec(one, fitted.codec, fitted)
    short, long = (cached_by(one.model, long_ids(1, n)) for n in (SWITCH, SWITCH + 1))
    assert codec.encode(short)
    with pytest.raises(CodecError, match="41 tokens: in more than 40 the model rotates keys with frequencies"):
        codec.encode(long)
    assert codec.encode(long, force=True)


@torch.no_grad()
def grown(model: PreTrainedModel, cache: DynamicCache, tokens: int) -> None:
    for token in long_ids(1, tokens)[0]:
        model(input_ids=token[None, None], past_key_values=cache, use_cache=True)


@pytest.mark.parametrize("kind", KINDS)
def test_a_live_cache_says_once_that_the_rotation_has_changed(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    model = changing(kind)
    cache = CompressedCache(model, fine_codec(model))
    grown(model, cache, SWITCH)
    assert not caplog.records
    grown(model, cache, 5)
    (said,) = caplog.records
    assert said.levelno == logging.WARNING
    assert said.getMessage().startswith(
        "the compressed cache contains 41 tokens: in texts of more than 40 tokens the model rotates keys"
    )


def test_a_live_cache_says_once_that_its_codec_was_fitted_on_shorter_texts(caplog: pytest.LogCaptureFixture) -> None:
    model = long_model("gpt2")
    cache = CompressedCache(model, replace(fine_codec(model), reach=20))
    grown(model, cache, 25)
    (said,) = caplog.records
    assert said.getMessage().startswith("the compressed cache contains 21 tokens: the codec was fitted for 20 positions")


def test_a_fit_says_for_how_many_positions_it_is() -> None:
    sequences = random_sequences(*[32] * 64)
    assert (
        fit_live(CalibrationSet(Session(tiny_loaded("gpt2")), sequences)).at_bits(8).reach == 32
    )  # learned positions: those of the calibration
    llama = tiny_loaded("llama")
    assert fit_live(CalibrationSet(Session(llama), sequences)).at_bits(8).reach == llama.model.config.max_position_embeddings
