"""Attention sinks are found by the attention that they receive: planted ones, and that of a pretrained model."""

import copy

import numpy as np
import pytest
import torch
from transformers import DynamicCache

from eager_attention import eager_weights
from eigencache.calibration import sinks as subject
from eigencache.calibration.session import Session
from eigencache.calibration.sinks import DISTANCE, measure_sinks
from eigencache.corpora.resolve import read_text
from eigencache.corpora.sequences import pack
from eigencache.errors import LayerError
from eigencache.models.gradients import cache_gradients
from real_models import smollm2
from tiny_models import tiny

LENGTHS = (60, 47, 60, 33, 60)
SINK = 120  # a token that `sequences` does not draw


def sequences_with(sequences, position: int):
    """Random ids with the token `SINK` at one position of every sequence."""
    text = sequences(*LENGTHS)
    for ids in text.ids:
        ids[position] = SINK
    return text


def model_with_sink():
    """A llama whose token `SINK` has a key that all queries point to, in all heads and layers.

    The embedding of the token is the only one with a component along the first hidden axis, which nothing writes to later.
    A key reads it along the slowest pair of dimensions, where queries have a large bias.
    """
    model = copy.deepcopy(tiny("llama"))
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] = 0.0
        model.model.embed_tokens.weight[SINK] = 0.0
        model.model.embed_tokens.weight[SINK, 0] = 100.0
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight[0] = layer.mlp.down_proj.weight[0] = 0.0
            layer.self_attn.o_proj.bias[0] = layer.mlp.down_proj.bias[0] = 0.0
            layer.input_layernorm.weight[0] = 1.0
            for projection, scale in ((layer.self_attn.k_proj, 4.0), (layer.self_attn.q_proj, 0.0)):
                rows = torch.arange(7, projection.weight.shape[0], 16)
                projection.weight[rows, 0] = scale
            layer.self_attn.q_proj.bias[rows] = 10.0
    return model


@torch.no_grad()
def direct(model, text, layer_idx: int, kv_heads: int) -> tuple[np.ndarray, np.ndarray, list[dict[int, float]]]:
    """Shares on the first token, on the first four, and of every later position, by loops over the eager weights."""
    first, four = [[] for _ in range(kv_heads)], [[] for _ in range(kv_heads)]
    others: list[dict[int, list[float]]] = [{} for _ in range(kv_heads)]
    for ids in text.ids:
        row = torch.from_numpy(ids)[None]
        weights = eager_weights(model, row, torch.ones_like(row))[layer_idx][0].double().numpy()
        window = getattr(model.config, "sliding_window", None) or len(ids)
        if getattr(model.config, "layer_types", ["full_attention"] * 9)[layer_idx] == "full_attention":
            window = len(ids)
        for head, map_ in enumerate(weights):
            group = head // (len(weights) // kv_heads)
            for query in range(len(ids)):
                for position in range(query - DISTANCE + 1):
                    if query - position < window:
                        others[group].setdefault(position, []).append(map_[query, position])
                if DISTANCE + 3 <= query < window:
                    four[group].append(map_[query, :4].sum())
                    first[group].append(map_[query, 0])
    enough = len(four[0]) / 2
    means = [{p: float(np.mean(x)) for p, x in group.items() if len(x) >= enough and p >= 4} for group in others]
    return np.array([np.mean(x) for x in first]), np.array([np.mean(x) for x in four]), means


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "gpt_oss", "deepseek_v2"])
def test_shares_are_means_over_the_queries_that_are_far_enough(name, batch_size, loaded, sequences, monkeypatch) -> None:
    monkeypatch.setattr("eigencache.models.attention_weights._LOGITS", 2**13)
    one, text = loaded(name), sequences(*LENGTHS)
    record = measure_sinks(Session(one, batch_size=batch_size), text)
    layer = record.layers[1]
    assert (record.sequences, record.tokens, record.exact_tokens) == (5, sum(LENGTHS), None)
    first, four, others = direct(one.model, text, 1, one.geometry.layers[1].num_key_value_heads)
    np.testing.assert_allclose(layer.first_share, first, rtol=1e-4)
    np.testing.assert_allclose(layer.first_four_share, four, rtol=1e-4)
    np.testing.assert_allclose(layer.other_share, [max(x.values()) for x in others], rtol=1e-4)
    assert layer.other_position == [max(x, key=x.__getitem__) for x in others]


def test_a_window_that_is_long_enough_counts_the_queries_within_it(loaded, sequences) -> None:
    model = copy.deepcopy(tiny("gemma2"))
    model.config.sliding_window = 30
    for layer in model.model.layers:
        if layer.self_attn.sliding_window:
            layer.self_attn.sliding_window = 30
    text = sequences(*LENGTHS)
    layer = measure_sinks(Session(loaded(model)), text).layers[0]
    first, four, _ = direct(model, text, 0, 2)
    np.testing.assert_allclose(layer.first_share, first, rtol=1e-4)
    np.testing.assert_allclose(layer.first_four_share, four, rtol=1e-4)


def test_a_window_that_hides_the_first_tokens_is_the_reason_of_missing_numbers(loaded, sequences) -> None:
    record = measure_sinks(Session(loaded("gemma2")), sequences(*LENGTHS))
    assert record.reasons == [
        "layers 0, 2: no query at least 16 positions later attends to all of the first 4 tokens (its window is 8 tokens)"
    ]
    assert [bool(layer.first_share) for layer in record.layers] == [False, True, False, True]
    assert all(len(layer.slots) == 2 for layer in record.layers)


def test_a_model_whose_attention_is_not_heard_has_norms_and_a_reason(loaded, sequences) -> None:
    record = measure_sinks(Session(loaded("bloom")), sequences(*LENGTHS))
    (reason,) = record.reasons
    assert reason.startswith("layers 0, 1, 2: attention was not measured: the model does not compute it by")
    assert all(not layer.first_share and len(layer.slots) == 2 for layer in record.layers)


def test_sequences_too_short_for_a_far_query_have_a_reason(loaded, sequences) -> None:
    record = measure_sinks(Session(loaded("llama")), sequences(*[18] * 4))
    assert record.reasons == ["layers 0, 1, 2: no query at least 16 positions later attends to all of the first 4 tokens"]


def test_a_planted_first_token_receives_nearly_all_attention_of_all_heads(loaded, sequences) -> None:
    record = measure_sinks(Session(loaded(model_with_sink())), sequences_with(sequences, 0))
    for layer in record.layers:
        assert min(layer.first_share) > 0.95 and min(layer.first_four_share) >= min(layer.first_share)
        assert max(layer.other_share) < 0.01
    plain = measure_sinks(Session(loaded("llama")), sequences(*LENGTHS))
    assert max(share for layer in plain.layers for share in layer.first_share) < 0.1


def test_a_planted_sink_at_a_later_position_is_found_there(loaded, sequences) -> None:
    record = measure_sinks(Session(loaded(model_with_sink())), sequences_with(sequences, 9))
    for layer in record.layers:
        assert layer.other_position == [9, 9] and min(layer.other_share) > 0.95 and max(layer.first_share) < 0.01


def test_norms_are_those_of_an_ordinary_cache_without_padding(loaded, sequences) -> None:
    one, text = loaded("llama"), sequences(*LENGTHS)
    record = measure_sinks(Session(one, batch_size=5), text, layers=(2,))
    assert [layer.layer_idx for layer in record.layers] == [2]
    for slot, kind in enumerate(("keys", "values")):
        rows = []
        for ids in text.ids:
            cache = DynamicCache(config=one.model.config)
            with torch.no_grad():
                one.model.base_model(input_ids=torch.from_numpy(ids)[None], past_key_values=cache, use_cache=True)
            rows.append(np.linalg.norm(getattr(cache.layers[2], kind)[0].double().numpy(), axis=-1))
        found, norms = record.layers[0].slots[slot], np.concatenate(rows, 1)
        positions = np.concatenate([np.arange(row.shape[1]) for row in rows])
        assert found.kind == kind and found.gradient_energy is None and found.gradient_share is None
        np.testing.assert_allclose(found.first_norm, np.mean([row[:, 0] for row in rows], 0), rtol=1e-5)
        np.testing.assert_allclose(found.median_norm, np.sort(norms, 1)[:, (norms.shape[1] - 1) // 2], rtol=1e-5)
        np.testing.assert_allclose(found.largest_norm, norms.max(1), rtol=1e-5)
        assert found.largest_position == positions[norms.argmax(1)].tolist()


def test_gradients_are_measured_on_request_on_the_beginning_of_every_sequence(loaded, sequences, monkeypatch) -> None:
    monkeypatch.setattr(subject, "BACKWARD_TOKENS", 40)
    one, text = loaded("llama"), sequences(*LENGTHS)
    said: list[str] = []
    session = Session(one, batch_size=2, on_progress=lambda what, done, of: said.append(f"{what} {done}/{of}"))
    record = measure_sinks(session, text, gradients=True)
    energies = [cache_gradients(one.model, torch.from_numpy(ids[:40])[None])[1][1][0].double().square() for ids in text.ids]
    energies = [x.sum((0, 2)).numpy() for x in energies]
    found = record.layers[1].slots[1]
    np.testing.assert_allclose(found.gradient_energy, np.mean([x[:16] for x in energies], 0), rtol=1e-3)
    later = np.concatenate([x[16:] for x in energies])
    assert found.gradient_energy_rest == pytest.approx(later.mean(), rel=1e-3)
    total = sum(x.sum() for x in energies)
    assert found.gradient_share == pytest.approx(sum(x[:4].sum() for x in energies) / total, rel=1e-3)
    assert record.exact_tokens == 4
    assert said[:3] == [f"attention sinks {done}/5" for done in (2, 4, 5)] and said[-1] == "gradients 5/5"


def test_gradients_that_memory_does_not_allow_have_a_reason(loaded, sequences) -> None:
    record = measure_sinks(Session(loaded("llama"), memory=2**20), sequences(*LENGTHS), gradients=True)
    (reason,) = record.reasons
    assert reason.startswith("gradients were not measured: a backward pass needs about ") and "0.00098 GiB" in reason
    assert record.exact_tokens is None and record.layers[0].first_share
    assert all(slot.gradient_share is None for layer in record.layers for slot in layer.slots)


def test_an_mla_model_has_the_norms_of_its_latent_and_the_attention_of_its_heads(loaded, sequences) -> None:
    layer = measure_sinks(Session(loaded("deepseek_v2")), sequences(*LENGTHS)).layers[0]
    assert [slot.kind for slot in layer.slots] == ["latent", "key_rope"]
    assert [len(slot.first_norm) for slot in layer.slots] == [1, 1] and len(layer.first_share) == 4


def test_a_layer_that_does_not_exist_is_refused(loaded, sequences) -> None:
    with pytest.raises(LayerError, match="no layer 7"):
        measure_sinks(Session(loaded("llama")), sequences(*LENGTHS), layers=(7,))


@pytest.mark.real
def test_the_first_token_of_a_pretrained_model_is_a_sink_with_a_small_key_and_value() -> None:
    loaded = smollm2()
    text = pack(read_text("stdlib"), loaded.tokenizer, tokens=2 * 192, max_length=192)
    layers = measure_sinks(Session(loaded, batch_size=2), text).layers
    shares = [float(np.mean(layer.first_share)) for layer in layers]
    assert sum(share > 0.2 for share in shares) > len(layers) / 2  # a uniform share would be 0.01
    assert max(max(layer.other_share) for layer in layers) < max(shares)
    small = [np.divide(slot.first_norm, slot.median_norm).mean() < 1 for layer in layers for slot in layer.slots]
    assert sum(small) > len(small) / 2
