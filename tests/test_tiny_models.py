"""Every registered architecture runs, is finite, fills a cache and has no setting left at a degenerate default."""

from __future__ import annotations

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, DynamicCache

import tiny_models
from tiny_models import LENGTH, NO_CACHE_NAMES, NO_RETURNED_CACHE_NAMES, VOCAB, tiny

CACHED_NAMES = [name for name in tiny_models.available() if name not in NO_CACHE_NAMES]


@pytest.mark.parametrize("name", tiny_models.available())
def test_forward_is_finite_and_returns_a_cache(name: str) -> None:
    with torch.no_grad():
        output = tiny(name)(input_ids=tiny_models.token_ids(), use_cache=True)
    assert output.logits.shape == (2, LENGTH, VOCAB)
    assert torch.isfinite(output.logits).all()
    assert output.logits.std() > 0.05
    returned = getattr(output, "past_key_values", None)
    assert (returned is None) == (name in NO_CACHE_NAMES + NO_RETURNED_CACHE_NAMES)


@pytest.mark.parametrize("name", CACHED_NAMES)
def test_the_callers_cache_is_shown_every_token(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny(name)
    cache = DynamicCache(config=model.config)
    lengths: list[int] = []
    for layer in cache.layers:
        if (update := getattr(layer, "update", None)) is None:
            continue  # a linear-attention layer

        def watch(keys, values, *args, update=update, **kwargs):
            lengths.extend((keys.shape[-2], values.shape[-2]))
            return update(keys, values, *args, **kwargs)

        monkeypatch.setattr(layer, "update", watch)
    with torch.no_grad():
        model.base_model(input_ids=tiny_models.token_ids(), past_key_values=cache, use_cache=True)
    assert lengths
    assert set(lengths) == {LENGTH}


@pytest.mark.parametrize("name", tiny_models.available())
def test_biases_and_norm_weights_are_not_constant(name: str) -> None:
    for key, tensor in tiny(name).named_parameters():
        assert torch.isfinite(tensor).all(), key
        if tensor.numel() > 1:
            assert tensor.std() > 1e-3, key


def test_building_twice_gives_the_same_model_and_leaves_the_random_state() -> None:
    state = torch.random.get_rng_state()
    first, second = (tiny_models._BUILDERS["bamba"]().state_dict() for _ in range(2))
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert torch.equal(state, torch.random.get_rng_state())


def test_name_groups_are_registered_names() -> None:
    groups = (
        tiny_models.MLA_NAMES,
        tiny_models.HYBRID_NAMES,
        tiny_models.SHARED_KV_NAMES,
        tiny_models.NO_CACHE_NAMES,
        tiny_models.NO_ROTATION_NAMES,
        tiny_models.MIXED_ROTATION_NAMES,
        tiny_models.NO_RETURNED_CACHE_NAMES,
    )
    for group in groups:
        assert set(group) <= set(tiny_models.NAMES)
    assert not set(tiny_models.NOT_BUILDABLE) & set(tiny_models.NAMES)


@pytest.mark.parametrize("name", [name for name in tiny_models.NOT_BUILDABLE if name in CONFIG_MAPPING])
def test_what_is_left_out_really_has_no_class(name: str) -> None:
    with pytest.raises(ValueError, match="Unrecognized configuration class"):
        AutoModelForCausalLM.from_config(CONFIG_MAPPING[name]())
