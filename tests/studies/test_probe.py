"""The probe against NumPy on vectors taken from an ordinary cache, and against planted answers."""

import copy

import numpy as np
import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from eigencache.calibration.session import Session
from eigencache.errors import ModelError, NonFiniteError, StatisticsError, TokenizerMismatchError
from eigencache.records.probe import ProbeRecord
from eigencache.spectral.rope import angles_from, unrotate
from eigencache.studies.probe import ProbeSettings, probe_model

pytestmark = pytest.mark.slow

SETTINGS = ProbeSettings(demonstration=False)
LENGTHS = (40, 40, 33, 40, 40, 40, 21, 40, 40, 40, 40, 40)


def vectors(model, ids_list, layer_idx: int, slot: str) -> np.ndarray:
    """What an ordinary cache holds, [tokens, heads, dim] in float64."""
    rows = []
    for ids in ids_list:
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            model.base_model(input_ids=torch.from_numpy(ids)[None], past_key_values=cache, use_cache=True)
        rows.append(getattr(cache.layers[layer_idx], slot)[0].transpose(0, 1).double().numpy())
    return np.concatenate(rows)


def svd_eigenvalues(x: np.ndarray, centered: bool) -> np.ndarray:
    x = x - x.mean(0) if centered else x
    return np.linalg.svd(x, compute_uv=False) ** 2 / len(x)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "falcon"])
def test_every_scope_agrees_with_a_float64_svd_of_the_cache(name: str, loaded, sequences) -> None:
    one, text = loaded(name), sequences(*LENGTHS)
    record = probe_model(Session(one), text, SETTINGS)
    keys_name = "keys" if name == "gpt2" else "keys_post_rope"
    for slot, wanted in (("keys", keys_name), ("values", "values")):
        layers = [vectors(one.model, text.ids, i, slot) for i in one.geometry.cached_layers]
        joined = np.concatenate([x.reshape(len(x), -1) for x in layers], -1)
        for spectrum in record.select(wanted, centered=None):
            if spectrum.scope == "all":
                x = joined
            else:
                x = layers[spectrum.layer_idx]
                x = x.reshape(len(x), -1) if spectrum.scope == "layer" else x[:, spectrum.head]
            expected = svd_eigenvalues(x, spectrum.centered)
            np.testing.assert_allclose(spectrum.eigenvalues, expected, atol=1e-6 * expected[0], rtol=1e-5)
            assert spectrum.vectors == sum(LENGTHS)
            np.testing.assert_allclose(spectrum.mean_norm, np.linalg.norm(x.mean(0)), rtol=1e-4, atol=1e-6)


def test_keys_before_rotation_are_those_of_the_cache_unrotated(loaded, sequences) -> None:
    one, text = loaded("llama"), sequences(*[40] * 12)
    record = probe_model(Session(one), text, SETTINGS)
    positions = torch.arange(40)[None]
    tables = one.model.model.rotary_emb(torch.zeros(1, 40, 1), positions)
    after = torch.from_numpy(vectors(one.model, text.ids, 0, "keys")).unflatten(0, (12, 40)).transpose(1, 2)
    angles = angles_from(tuple(table.double() for table in tables))
    before = unrotate(after, angles, "half").transpose(1, 2).flatten(0, 1).flatten(1).numpy()
    (spectrum,) = record.select("keys_pre_rope", "layer", 0)
    np.testing.assert_allclose(spectrum.eigenvalues, svd_eigenvalues(before, True), rtol=1e-3, atol=1e-5)


def test_the_result_does_not_depend_on_the_batch_size(loaded, sequences) -> None:
    one, text = loaded("qwen2"), sequences(*LENGTHS)
    records = [probe_model(Session(one, batch_size=size), text, SETTINGS) for size in (1, 5, 12)]
    for spectra in zip(*(record.spectra for record in records), strict=True):
        for other in spectra[1:]:
            np.testing.assert_allclose(spectra[0].eigenvalues, other.eigenvalues, rtol=1e-4, atol=1e-6)
            assert spectra[0].effective_vectors == pytest.approx(other.effective_vectors, rel=1e-3)


def test_a_planted_rank_comes_back_from_the_model(loaded, sequences) -> None:
    model = copy.deepcopy(loaded("llama").model)
    torch.manual_seed(0)
    with torch.no_grad():
        projection = model.model.layers[0].self_attn.v_proj
        weight, rank = projection.weight, 3
        left, right = torch.randn(weight.shape[0], rank), torch.randn(rank, weight.shape[1])
        weight.copy_(left @ right)
    record = probe_model(Session(loaded(model)), sequences(*[200] * 40), SETTINGS)
    (planted,) = record.select("values", "layer", 0)
    (full,) = record.select("keys_pre_rope", "layer", 0)
    assert planted.rank_99 is not None
    assert planted.rank_99 <= rank < full.rank_99
    assert planted.condition_number == np.inf
    assert planted.held_out_energy[4] == pytest.approx(1.0, abs=1e-6)


def test_a_repetitive_text_is_refused_and_the_classic_figure_is_shown_to_lie(loaded, sequences) -> None:
    one = loaded("llama")
    four = sequences(16, 16, 16, 16)
    repeated = four.ids * 16
    corpus = four.corpus.model_copy(update={"tokens": 1024, "sequences": 64})
    text = type(four)(repeated, corpus)
    record = probe_model(Session(one), text, SETTINGS)
    honest = probe_model(Session(one), sequences(*[40] * 200), SETTINGS)
    (lied,) = [row for row in record.classic if row.kind == "values"]
    (told,) = [row for row in honest.classic if row.kind == "values"]
    assert lied.energy_16 > told.energy_16 + 0.01
    assert all(s.support < 10 for s in record.spectra if s.scope != "head")
    assert any("ranks refused" in warning for warning in record.warnings)
    refused = record.select("keys_post_rope", "all")[0]
    assert refused.effective_rank is None
    assert refused.rank_90 is None
    assert refused.refusals


def test_the_share_of_spread_that_rotation_makes_is_the_rotated_mean(loaded, sequences) -> None:
    record = probe_model(Session(loaded("qwen2")), sequences(*[60] * 20), SETTINGS)
    for frame in record.frames:
        (before,) = record.select("keys_pre_rope", "layer", frame.layer_idx)
        (after,) = record.select("keys_post_rope", "layer", frame.layer_idx)
        gained = before.mean_norm**2 - after.mean_norm**2
        assert frame.variance_post_rope - frame.variance_pre_rope == pytest.approx(gained, rel=1e-3)
        assert 0 < frame.rotated_mean_share < 1


def test_rotation_adds_no_independent_vectors(loaded, sequences) -> None:
    record = probe_model(Session(loaded("llama")), sequences(*[60] * 20), SETTINGS)
    for after in record.select("keys_post_rope"):
        (before,) = record.select("keys_pre_rope", after.scope, after.layer_idx, after.head)
        if (after.layer_idx, after.head, after.scope) == (before.layer_idx, before.head, before.scope):
            assert after.effective_vectors <= before.effective_vectors


@pytest.mark.parametrize(("frame", "absent"), [("pre", "keys_post_rope"), ("post", "keys_pre_rope")])
def test_a_frame_that_was_not_asked_for_is_left_out(frame, absent, loaded, sequences) -> None:
    record = probe_model(Session(loaded("llama")), sequences(*LENGTHS), ProbeSettings(frame=frame, demonstration=False))
    assert absent not in record.names
    assert "values" in record.names


def test_mla_is_probed_as_latent_rotary_key_and_what_they_expand_to(loaded, sequences) -> None:
    record = probe_model(Session(loaded("deepseek_v2")), sequences(*LENGTHS), SETTINGS)
    assert record.names == ["latent", "key_rope_pre_rope", "key_rope_post_rope", "keys_nope", "values"]
    assert {row.kind for row in record.classic} == {"latent", "key_rope", "keys_nope", "values"}


def test_layers_without_a_cache_are_skipped(loaded, sequences) -> None:
    one = loaded("qwen3_next")
    record = probe_model(Session(one), sequences(*LENGTHS), SETTINGS)
    assert {s.layer_idx for s in record.spectra} - {None} == set(one.geometry.cached_layers)
    assert one.geometry.skipped


def test_a_tight_memory_budget_takes_fewer_folds_and_then_refuses(loaded, sequences) -> None:
    one, text = loaded("llama"), sequences(*[20] * 40)
    roomy = probe_model(Session(one), text, SETTINGS)
    tight = probe_model(Session(one, memory=1_500_000), text, SETTINGS)
    assert roomy.run.settings["folds"] == 16
    assert 2 <= tight.run.settings["folds"] < 16
    np.testing.assert_allclose(tight.spectra[0].eigenvalues, roomy.spectra[0].eigenvalues, rtol=1e-6, atol=1e-9)
    with pytest.raises(StatisticsError, match="GiB"):
        probe_model(Session(one, memory=1000), text, SETTINGS)


def test_mistaken_inputs_are_named(loaded, sequences) -> None:
    with pytest.raises(TokenizerMismatchError, match="embeds only 128"):
        probe_model(Session(loaded("llama")), sequences(40, vocabulary=5000), SETTINGS)
    with pytest.raises(ModelError, match="Use `max_length` ≤ 64"):
        probe_model(Session(loaded("gpt2")), sequences(100), SETTINGS)
    broken = copy.deepcopy(loaded("gpt2").model)
    with torch.no_grad():
        broken.transformer.h[1].attn.c_attn.weight[0, -1] = torch.inf
    with pytest.raises(NonFiniteError, match="values: layer 1, head 3"):
        probe_model(Session(loaded(broken)), sequences(*LENGTHS), SETTINGS)


def test_a_record_survives_the_disk(loaded, sequences, tmp_path) -> None:
    record = probe_model(Session(loaded("gpt2")), sequences(*LENGTHS), SETTINGS)
    record.save(tmp_path / "record.json")
    assert ProbeRecord.load(tmp_path / "record.json") == record


def many_layers() -> LlamaForCausalLM:
    """A model whose layers together are too wide for a matrix of moments: 24 layers of 64 dimensions."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=64, num_attention_heads=4, num_key_value_heads=4, num_hidden_layers=24,
        vocab_size=128, max_position_embeddings=128,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def test_layers_too_wide_for_a_matrix_have_a_sample_whose_support_is_judged(loaded, sequences) -> None:
    one, text = loaded(many_layers()), sequences(*LENGTHS)
    everything = probe_model(Session(one), text, SETTINGS)
    assert {s.scope for s in everything.spectra} == {"head", "layer", "all"}
    (values,) = everything.select("values", "all")
    joined = np.concatenate([vectors(one.model, text.ids, i, "values").reshape(sum(LENGTHS), -1) for i in range(24)], -1)
    expected = svd_eigenvalues(joined, True)
    np.testing.assert_allclose(values.eigenvalues[: len(expected)], expected, atol=1e-5 * expected[0])
    assert (values.width, values.vectors, len(values.eigenvalues)) == (1536, sum(LENGTHS), 1536)
    assert values.rank_90 is None
    assert values.refusals
    assert any("ranks refused" in line and "values at scope all" in line for line in everything.warnings)
    alone = probe_model(Session(one), text, ProbeSettings(scopes=("all",), demonstration=False))
    assert {s.scope for s in alone.spectra} == {"all"}
    (matrix,) = alone.select("values", "all")
    np.testing.assert_allclose(matrix.eigenvalues[:100], values.eigenvalues[:100], rtol=1e-3)
