"""Metrics measured on models say what an error really costs, told by applying the error."""

import numpy as np
import pytest
import torch

from eigencache.calibration.attention_metric import attention_metrics, lag_weights
from eigencache.calibration.fisher_metric import fisher_metrics
from eigencache.calibration.session import Session
from eigencache.codec.sinks_and_window import FIRST_EXACT
from eigencache.errors import StatisticsError, UnsupportedArchitectureError
from eigencache.models.capture import Capture
from eigencache.models.gradients import cache_gradients
from eigencache.models.rope_detection import rotations_of
from eigencache.spectral.rope import rotate

LENGTHS = (24, 24, 16)


def captured(loaded, sequences):
    """Layer → tensor name → vectors [heads, tokens, dim] of all tokens."""
    found: dict[int, dict[str, list]] = {}
    with Capture(loaded.model, loaded.geometry, queries=True) as capture:
        for ids in sequences.ids:
            for layer in capture.run(torch.from_numpy(ids)[None]):
                for name, x in layer.tensors.items():
                    found.setdefault(layer.layer_idx, {}).setdefault(name, []).append(x[0].double())
    return {i: {name: torch.cat(rows, 1) for name, rows in names.items()} for i, names in found.items()}


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("name", ["gpt2", "llama", "qwen2", "qwen3", "gemma2"])
def test_a_key_error_costs_the_logit_error_of_the_queries_of_its_group(name, loaded, sequences) -> None:
    one, text = loaded(name), sequences(*LENGTHS)
    metrics = attention_metrics(Session(one), text, rotations_of(one))
    for layer_idx, tensors in captured(one, text).items():
        layer = one.geometry.layers[layer_idx]
        kind = "keys" if "queries" in tensors else "keys_post_rope"
        queries = tensors["queries" if "queries" in tensors else "queries_post_rope"]
        groups = queries.unflatten(0, (layer.num_key_value_heads, -1))
        error = draw(layer.head_dim)
        for head in range(layer.num_key_value_heads):
            expected = float((groups[head] @ error).square().mean(1).sum()) / layer.head_dim
            metric = metrics[kind][layer_idx][head]
            assert float(error @ metric @ error) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_value_error_costs_what_the_output_projection_makes_of_it(name, loaded, sequences) -> None:
    one, text = loaded(name), sequences(*LENGTHS)
    metrics = attention_metrics(Session(one), text, rotations_of(one))["values"]
    attentions = [m for m in one.model.modules() if getattr(m, "layer_idx", None) == 1 and hasattr(m, "config")]
    attention = next(m for m in attentions if hasattr(m, "o_proj") or hasattr(m, "c_proj"))
    project = getattr(attention, "o_proj", None) or attention.c_proj
    layer = one.geometry.layers[1]
    group = layer.num_attention_heads // layer.num_key_value_heads
    error = draw(layer.v_head_dim)
    for head in range(layer.num_key_value_heads):
        cost = 0.0
        for query_head in range(head * group, (head + 1) * group):
            outputs = torch.zeros(2, layer.num_attention_heads, layer.v_head_dim)
            outputs[1, query_head] = error.float()
            with torch.no_grad():
                without, with_error = project(outputs.flatten(1))
            cost += float((with_error - without).double().square().sum())
        assert float(error @ metrics[1][head] @ error) == pytest.approx(cost, rel=1e-4)


def test_lag_weights_are_the_attention_of_the_model(loaded, sequences) -> None:
    one = loaded("llama")
    one.model.set_attn_implementation("eager")
    ids = torch.from_numpy(sequences(20).ids[0])[None]
    with torch.no_grad():
        attentions = one.model(ids, output_attentions=True).attentions
    one.model.set_attn_implementation("sdpa")
    with Capture(one.model, one.geometry, queries=True) as capture:
        for layer in capture.run(ids):
            weights = lag_weights(layer, torch.ones_like(ids))
            shares = attentions[layer.layer_idx][0].double().sum(0).numpy()
            expected = [np.trace(shares, -lag) for lag in range(20)]
            np.testing.assert_allclose(weights.numpy(), expected, atol=1e-4)


@pytest.mark.parametrize("name", ["deepseek_v2", "deepseek_v3"])
def test_a_latent_error_costs_both_of_its_ways(name, loaded, sequences) -> None:
    one, text = loaded(name), sequences(*LENGTHS)
    metrics = attention_metrics(Session(one), text, rotations_of(one))["latent"]
    tensors, layer = captured(one, text)[1], one.geometry.layers[1]
    attention = next(m for m in one.model.modules() if getattr(m, "layer_idx", None) == 1 and hasattr(m, "kv_b_proj"))
    nope = layer.mla.qk_nope_head_dim
    error = draw(layer.mla.kv_lora_rank)
    with torch.no_grad():
        expanded = attention.kv_b_proj(error.float()).double().unflatten(0, (layer.num_attention_heads, -1))
        keys, values = expanded[:, :nope], expanded[:, nope:]
        queries = tensors["queries_pre_rope"][..., :nope]
        cost = float((queries @ keys[:, :, None]).square().mean(1).sum()) / layer.head_dim
        for head in range(layer.num_attention_heads):
            outputs = torch.zeros(1, layer.num_attention_heads, layer.v_head_dim)
            outputs[0, head] = values[head].float()
            bias = attention.o_proj(torch.zeros_like(outputs).flatten(1))
            cost += float((attention.o_proj(outputs.flatten(1)) - bias).double().square().sum())
    assert float(error @ metrics[1][0] @ error) == pytest.approx(cost, rel=1e-4)


@pytest.mark.parametrize("name", ["gpt2", "llama", "deepseek_v2"])
def test_the_fisher_metric_is_the_mean_square_of_the_gradient_along_an_error_after_the_first_tokens(
    name, loaded, sequences
) -> None:
    one, text = loaded(name), sequences(*LENGTHS)
    rotations = rotations_of(one)
    metrics = fisher_metrics(
        Session(one, batch_size=2),
        text,
        rotations,
    )
    mla = one.geometry.mla is not None
    kinds = ("latent", "key_rope") if mla else ("keys", "values")
    along: dict[str, list[torch.Tensor]] = {}
    for ids in text.ids:
        for slot, gradient in enumerate(cache_gradients(one.model, torch.from_numpy(ids)[None])[1]):
            error = draw(gradient.shape[-1])
            rotation = rotations.get(1) if slot == int(mla) else None
            if rotation is None:
                along.setdefault(kinds[slot], []).append(gradient[0, 0].double() @ error)
                continue
            at = rotation.angles(torch.arange(len(ids)))
            turned = rotate(error.expand(1, 1, len(ids), -1), at, rotation.pairing)[0, 0]
            along.setdefault(f"{kinds[slot]}_pre_rope", []).append((gradient[0, 0].double() * turned).sum(-1))
            along.setdefault(f"{kinds[slot]}_post_rope", []).append(gradient[0, 0].double() @ error)
    assert set(along) == set(metrics)
    for kind, rows in along.items():
        metric = metrics[kind][1][0]
        error = draw(len(metric))
        assert float(error @ metric @ error) == pytest.approx(
            float(torch.cat([row[FIRST_EXACT:] for row in rows]).square().mean()), rel=1e-3
        )


def test_sequences_of_first_tokens_alone_have_no_fisher_metric(loaded, sequences) -> None:
    with pytest.raises(StatisticsError, match="No sequence is longer than the 4 first tokens"):
        fisher_metrics(Session(loaded("llama")), sequences(FIRST_EXACT, 2), {})


def test_queries_that_cannot_be_captured_are_named(loaded, sequences) -> None:
    one = loaded("bloom")
    with pytest.raises(UnsupportedArchitectureError, match=r"queries of layer \d|no output projection"):
        metrics = attention_metrics(Session(one), sequences(*LENGTHS), {})
        raise UnsupportedArchitectureError("queries of layer 0") if "keys" in metrics else AssertionError
