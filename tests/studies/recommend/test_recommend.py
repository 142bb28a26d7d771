"""Advice follows what was measured: within the budget for certain, stated where it was not chosen, or plainly none."""

import math
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch

import planted_sweeps as planted
from eigencache.api import recommend
from eigencache.calibration.session import Session
from eigencache.corpora.sequences import Sequences
from eigencache.errors import BudgetError, CorpusError, ModelError, RecordError, StatisticsError
from eigencache.fitting.pca import PCACalibration
from eigencache.models.identity import fingerprint
from eigencache.models.key_bias import key_biases
from eigencache.records.advice import Advice, Budget, ReportRecord
from eigencache.records.quality import ReadingProtocol, SweepRecord
from eigencache.studies.probe import ProbeSettings, probe_model
from eigencache.studies.recommend.candidates import Search, coarse_plans, fine_plans, rank_for, targets_and_scopes
from eigencache.studies.recommend.commands import Recipe
from eigencache.studies.recommend.halves import halves_of, repeats, some_of
from eigencache.studies.recommend.key_rounding import measure_keys
from eigencache.studies.recommend.pca import PASSES
from eigencache.studies.recommend.recommend import partial_paths, recommend_model, recommend_sweep
from eigencache.studies.recommend.subject import check_same_model, read_subject
from planted_sweeps import series, sweep
from tiny_models import tiny

pytestmark = pytest.mark.slow

PROTOCOL = ReadingProtocol(kind="prefix", length=20)
SEARCH = Search(coarse_shares=(0.25, 1.0), coarse_sequences=4, fine=((8, (1,)), (16, (1,))))
RECIPE = Recipe("tiny", "stdlib", 2_560, 64)
PCA = {"families": ("pca",), "search": SEARCH}
LOOSE, ZERO = Budget(nats=10.0, given="loose"), Budget(nats=0.0, given="--budget-nll 0")


@pytest.fixture
def text(sequences) -> Sequences:
    return sequences(*(40,) * 18, seed=1)


@pytest.fixture
def calibration_text(sequences) -> Sequences:
    return sequences(*(64,) * 40)


def advised(record: SweepRecord, nats: float = 0.01) -> Advice:
    return recommend_sweep(record, Budget(nats=nats, given="planted"), "sweep.json")


# Budgets


@pytest.mark.parametrize(("given", "nats"), [("1%", math.log(1.01)), ("0.01", math.log(1.01)), ("0", 0.0), (" 50 % ", None)])
def test_a_share_of_perplexity_becomes_nats(given: str, nats: float | None) -> None:
    assert Budget.of_ppl(given).nats == pytest.approx(math.log(1.5) if nats is None else nats)


@pytest.mark.parametrize("given", ["", "one", "nan", "inf", "-1%", "1", "100%", "1%%"])
def test_what_is_no_share_of_perplexity_is_refused(given: str) -> None:
    with pytest.raises(BudgetError, match="`budget_ppl`"):
        Budget.of_ppl(given)


def test_nats_are_taken_as_they_are_and_nonsense_is_refused() -> None:
    assert Budget.of_nll("0.02").nats == 0.02
    for given in ("1%", "nan", "inf", "-0.1", ""):
        with pytest.raises(BudgetError, match="`budget_nll`"):
            Budget.of_nll(given)


@pytest.mark.parametrize("budget", [0.01, 0.0, "1%"])
def test_a_budget_of_another_type_is_refused_before_the_subject_is_read(budget) -> None:
    with pytest.raises(BudgetError, match=r"`budget` is .*: use Budget.of_nll\('0.01'\) or Budget.of_ppl\('1%'\)"):
        recommend("absent.json", budget=budget)


# The choice


def test_the_largest_ratio_whose_whole_interval_is_within_the_budget_is_chosen() -> None:
    record = sweep(
        series("v", (4, 1.9, 0.009, 0.004), (8, 1.8, 0.004, 0.002), (16, 1.5, 0.0, 0.001)),
        series("kv", (8, 8.0, 0.02, 0.001), (12, 6.0, 0.003, 0.008), (16, 4.0, 0.002, 0.003)),
    )
    advice = advised(record)
    assert advice.chosen
    assert (advice.chosen.target, advice.chosen.rank) == ("kv", 16)  # 12 is within by its estimate, not for certain
    assert [(other.target, other.rank) for other in advice.others] == [("v", 8)]
    assert advised(record, 0.03).chosen.rank == 8  # type: ignore[union-attr]


def test_a_ratio_of_one_a_random_basis_and_a_point_without_interval_are_never_chosen() -> None:
    record = sweep(
        series("v", (32, 1.0, 0.0, 0.0)),
        series("k", (8, 1.8, 0.0, 0.001), basis="random"),
        series("kv", (8, 8.0, 0.001, None)),
    )
    advice = advised(record)
    assert advice.chosen is None
    assert advice.nearest
    assert advice.nearest.target == "kv"
    assert math.isinf(advice.nearest.upper_nats)


def test_a_budget_of_zero_is_met_by_what_is_lossless_alone() -> None:
    lossy = series("v", (8, 1.8, 0.0001, 0.0001), (16, 1.5, -0.0001, 0.0002))
    assert advised(sweep(lossy), 0.0).chosen is None
    lossless = series("k", (32, 1.2, 0.0, 0.0), bits=16)
    assert advised(sweep(lossy, lossless), 0.0).chosen.target == "k"  # type: ignore[union-attr]


def test_bytes_and_the_length_that_pays_the_basis_back_follow_from_the_tensors_held() -> None:
    advice = advised(sweep(series("kv", (8, 8.0, 0.0, 0.001))))
    assert advice.chosen
    assert advice.chosen.sixteen_bit_nbytes_per_token == 256
    assert advice.chosen.nbytes_per_token == 32
    assert advice.chosen.break_even_context == math.ceil(6400 / (256 - 32))


def test_a_sweep_says_what_it_did_not_measure() -> None:
    advice = advised(sweep(series("v", (8, 1.8, 0.0, 0.001)), nll=3.5))
    unknown = "\n".join(advice.unknown)
    assert "the loss is reported on the tokens used for the choice" in unknown
    assert "not measured: K\n" in unknown
    assert "not measured: K and V" in unknown
    assert "not measured: scope layer, all" in unknown
    assert "not measured: metric frobenius" in unknown
    assert "not measured: coefficients in 16, 4 bits" in unknown
    assert "the keys have a bias, and its effect on fp8 and int8 keys was not measured" in unknown
    assert "3.50 nats per token uncompressed" in unknown


def test_what_is_not_known_depends_on_the_situation() -> None:
    found = series("v", (8, 1.8, 0.0, 0.001))
    large = sweep(found).model_copy(update={"model": planted.model(parameters=7_000_000_000)})
    assert any("parameters" in line for line in advised(sweep(found)).unknown)
    assert not any("parameters" in line for line in advised(large).unknown)
    assert not any("uncompressed" in line for line in advised(large).unknown)
    assert not any("intervals come from" in line for line in advised(large).unknown)  # 40 sequences
    geometry = large.model.geometry
    for hidden_size, redundant in ((geometry.hidden_size // 4, True), (geometry.hidden_size * 4, False)):
        other = sweep(found, geometry=geometry.model_copy(update={"hidden_size": hidden_size}))
        assert any("redundant by algebra" in line for line in advised(other).unknown) == redundant


def test_a_choice_at_the_lowest_rank_or_with_a_large_divergence_is_marked() -> None:
    found = series("v", (8, 1.8, -0.002, 0.002), (16, 1.5, 0.0, 0.001))
    found.points[0].quality.kl = 0.05
    unknown = "\n".join(advised(sweep(found)).unknown)
    assert "rank 8 is the lowest rank tried with these settings" in unknown
    assert "KL is 0.0500 nats, more than the budget" in unknown
    bracketed = series("v", (4, 1.9, 0.1, 0.002), (8, 1.8, 0.002, 0.002))
    unknown = "\n".join(advised(sweep(bracketed)).unknown)
    assert "lowest" not in unknown
    assert "KL is" not in unknown


def test_a_comparison_changes_one_thing_and_keeps_the_share_of_the_full_rank() -> None:
    record = sweep(
        series("k", (8, 1.8, 0.001, 0.001), (16, 1.5, 0.0, 0.001)),
        series("k", (8, 1.8, 0.004, 0.001), (16, 1.5, 0.002, 0.001), metric="frobenius"),
        series("k", (16, 1.7, 0.0005, 0.001), (32, 1.4, 0.0003, 0.001), scope="layer", width=64),
        series("k", (8, 1.8, 0.03, 0.001), (16, 1.5, 0.01, 0.001), frame="post"),
    )
    lines = {line.claim: line.figure for line in advised(record).evidence}
    chosen = advised(record).chosen
    assert chosen
    assert chosen.scope == "head"
    assert lines["the metric, all else equal, rank 16"] == "fisher: KL 0.0000 nats, frobenius: KL 0.0020 nats"
    assert lines["the scope, all else equal, rank 16 / 32"] == "head: KL 0.0000 nats, layer: KL 0.0003 nats"
    assert lines["the frame of K, all else equal, rank 16"] == "pre: KL 0.0000 nats, post: KL 0.0100 nats"


# The search


def test_the_rank_for_a_loss_lies_between_those_that_were_measured() -> None:
    found = series("v", (4, 1.9, 0.16, 0), (16, 1.5, 0.01, 0))
    assert rank_for(found, 0.04) == pytest.approx(8)
    assert rank_for(found, 1.0) == 4
    assert rank_for(found, 0.001) == found.width


def test_the_finer_pass_takes_the_best_of_each_target_the_runner_up_and_full_rank() -> None:
    coarse = sweep(
        series("v", (4, 1.94, 0.001, 0), (16, 1.78, 0.0001, 0)),
        series("kv", (4, 16.0, 0.02, 0), (16, 4.0, 0.001, 0)),
        series("kv", (4, 16.0, 0.004, 0), (16, 4.0, 0.0005, 0), metric="frobenius"),
        series("k", (4, 1.94, 0.02, 0), (16, 1.78, 0.009, 0)),
    )
    plans = fine_plans(coarse, 0.01, Search(fine=((8, (1, 1.5)), (4, (1,)))))
    tried = {(plan.settings.target, plan.settings.metric, plan.bits): plan.ranks for plan in plans}
    assert tried[("v", "fisher", 8)] == (4, 6)
    assert tried[("kv", "frobenius", 8)] == (4, 6, 32)
    assert tried[("kv", "fisher", 4)] == (8,)
    assert tried[("k", "fisher", 8)] == (32,)  # never reached the aim: full rank


def test_every_scope_that_is_different_and_affordable_is_tried(loaded) -> None:
    geometry = loaded("llama").geometry
    assert targets_and_scopes(geometry) == {target: ("head", "layer", "all") for target in ("v", "k", "kv")}
    assert targets_and_scopes(loaded("deepseek_v2").geometry) == {"latent": ("head", "all"), "key_rope": ("head", "all")}
    wide = geometry.model_copy(update={"layers": geometry.layers * 100})
    assert targets_and_scopes(wide)["kv"] == ("head", "layer", "all")
    assert targets_and_scopes(wide, 1280)["kv"] == ("head", "layer")


def test_what_the_calibration_text_cannot_carry_is_left_out_and_said(loaded, sequences) -> None:
    model = loaded("llama")
    little = PCACalibration(Session(model), sequences(40, 40), scopes=("head", "layer", "all"))
    plans, left_out = coarse_plans(model.geometry, little, Search(coarse_shares=(0.5,)))
    assert {plan.settings.scope for plan in plans} == {"head", "layer"}
    assert len(plans) + len(left_out) == 19
    assert all("n_eff" in line and "cannot carry a basis" in line for line in left_out)
    with pytest.raises(StatisticsError, match="cannot carry a basis"):
        coarse_plans(
            model.geometry, PCACalibration(Session(model), sequences(20), scopes=("head", "layer", "all")), Search()
        )


# Halves


def test_the_half_that_is_chosen_on_and_the_half_that_is_stated_on_share_no_sequence(text) -> None:
    choosing, stating = halves_of(text, PROTOCOL)
    assert [len(choosing.ids), len(stating.ids)] == [9, 9]
    assert not {row.tobytes() for row in choosing.ids} & {row.tobytes() for row in stating.ids}
    assert np.array_equal(np.concatenate([*choosing.ids, *stating.ids]), np.concatenate(text.ids))
    assert choosing.corpus.name == "random ids, sequences 1–9 of 18"
    assert choosing.corpus.tokens + stating.corpus.tokens == text.corpus.tokens
    assert repeats(choosing, stating) is None
    assert "repeats" in (repeats(choosing, choosing) or "")
    assert {row.tobytes() for row in some_of(choosing, 4).ids} < {row.tobytes() for row in choosing.ids}


def test_fewer_than_sixteen_sequences_cannot_be_halved(sequences) -> None:
    with pytest.raises(CorpusError, match=r"15 sequences have at least 22 tokens, but 16 are needed.* Raise `tokens`"):
        halves_of(sequences(*(40,) * 15, 21), PROTOCOL)
    with pytest.raises(CorpusError, match=r"0 sequences have at least 22 tokens.* Raise `max_length` or lower `prefix`"):
        halves_of(sequences(*(21,) * 16), PROTOCOL)


# Measured advice


def test_the_loss_is_stated_where_nothing_was_chosen_and_a_second_run_measures_nothing_anew(
    loaded, text, calibration_text, tmp_path: Path
) -> None:
    calls: list[tuple[str, int, int]] = []
    session = Session(loaded("llama"), batch_size=3, on_progress=lambda *a: calls.append(a))
    options = PCA | {"partial": tmp_path / "p"}
    advice = recommend_model(session, text, calibration_text, LOOSE, PROTOCOL, RECIPE, **options)
    assert advice.chosen
    assert advice.chosen.stating
    assert advice.stating
    assert advice.sweeps["fine"].corpus == advice.choosing != advice.stating == advice.sweeps["stated"].corpus
    best = max(point.quality.compression_ratio for found in advice.sweeps["fine"].series for point in found.points)
    assert advice.chosen.choosing.compression_ratio == best
    control = next(found for found in advice.sweeps["stated"].series if found.basis == "random")
    assert control.points[0].rank == advice.chosen.rank
    assert len(advice.sweeps["coarse"].series) == 19  # 3 targets, 3 scopes, 2 metrics, and keys after rotation
    assert any("coarse pass" in what for what, _, _ in calls)
    assert any("not used for the choice" in line.claim for line in advice.evidence)
    advice.save(tmp_path / "advice.json")
    assert Advice.load(tmp_path / "advice.json") == advice
    paths = partial_paths(tmp_path / "p")
    assert all(paths[name].exists() for name in PASSES)  # type: ignore[union-attr]
    calls.clear()
    again = recommend_model(session, text, calibration_text, LOOSE, PROTOCOL, RECIPE, **options)
    assert all(done == of for what, done, of in calls if "scoring" in what)
    assert again.model_copy(update={"run": advice.run}).chosen == advice.chosen
    assert again.evidence == advice.evidence


def test_a_text_that_cannot_be_scored_is_refused_before_the_calibration_text_is_read(loaded, sequences) -> None:
    calls: list[str] = []
    session = Session(loaded("gpt2"), on_progress=lambda what, *_: calls.append(what))
    long, calibration_text = sequences(*(70,) * 18, seed=1), sequences(*(64,) * 40)
    with pytest.raises(ModelError, match="64 positions, but 70 tokens are needed"):
        recommend_model(session, long, calibration_text, LOOSE, PROTOCOL, RECIPE, **PCA)
    assert not calls


def test_a_budget_that_nothing_meets_is_said_and_the_nearest_named(loaded, text, calibration_text) -> None:
    impossible = Budget(nats=-1.0, given="impossible")
    advice = recommend_model(Session(loaded("llama")), text, calibration_text, impossible, PROTOCOL, RECIPE, **PCA)
    assert advice.chosen is None
    assert advice.nearest
    assert "stated" not in advice.sweeps
    assert advice.holds is None
    assert any(line.claim.startswith("nearest to the budget") for line in advice.evidence)


def test_a_latent_is_advised_on_against_what_it_expands_to(loaded, text, calibration_text) -> None:
    advice = recommend_model(Session(loaded("deepseek_v2")), text, calibration_text, LOOSE, PROTOCOL, RECIPE, **PCA)
    assert advice.chosen
    assert {advice.chosen.target, *(other.target for other in advice.others)} == {"latent", "key_rope"}
    assert advice.keys is None
    assert any("expands to" in line.claim for line in advice.evidence)
    assert "the latent and the rotary key were compressed separately, not together" in advice.unknown


# Biases of keys


@pytest.mark.parametrize(("name", "module"), [("llama", "k_proj"), ("qwen2", "k_proj")])
def test_biases_are_those_of_the_projection(loaded, name: str, module: str) -> None:
    model = loaded(name)
    found = key_biases(model)
    for layer_idx, layer in enumerate(model.model.model.layers):
        assert torch.equal(found[layer_idx].flatten(), getattr(layer.self_attn, module).bias)


def test_the_bias_of_a_fused_projection_is_its_part_for_the_keys(loaded) -> None:
    model = loaded("gpt2")
    hidden = model.geometry.hidden_size
    for layer_idx, block in enumerate(model.model.transformer.h):
        expected = block.attn.c_attn.bias[hidden : 2 * hidden]
        assert torch.equal(key_biases(model)[layer_idx].flatten(), expected)


def test_a_bias_behind_a_norm_or_of_a_latent_is_none(loaded) -> None:
    assert key_biases(loaded("qwen3")) == {}
    assert key_biases(loaded("deepseek_v2")) == {}


def test_a_huge_bias_is_seen_and_taking_the_mean_out_undoes_what_it_does_to_rounded_keys(loaded, sequences, text) -> None:
    model = deepcopy(tiny("llama"))
    with torch.no_grad():
        for layer in model.model.layers:  # type: ignore[union-attr]
            layer.self_attn.k_proj.bias[::8] += 100.0  # type: ignore[operator]
    huge = loaded(model)
    calibration = PCACalibration(Session(huge), sequences(*(64,) * 8))
    keys = measure_keys(Session(huge), text, calibration.sequences, calibration.rotations, PROTOCOL)
    assert keys
    assert all(bias.share > 0.9 and bias.largest_to_median > 20 for bias in keys.biases)
    kl = {(rounding.kind, rounding.mean_out): rounding.quality.kl for rounding in keys.roundings}
    assert kl["fp8", False] > 10 * kl["fp8", True]
    assert kl["int8", False] > 10 * kl["int8", True]


# What is asked about


def test_a_file_is_read_by_its_schema_and_another_is_refused(tmp_path: Path) -> None:
    record = sweep(series("v", (8, 1.8, 0.0, 0.001)))
    record.save(tmp_path / "sweep.json")
    assert read_subject(str(tmp_path / "sweep.json")) == record
    assert read_subject("ref-llama") == "ref-llama"
    for content, says in (
        ("{", "not JSON"),
        ("[]", "is not a record"),
        ('{"schema_version": "x/1"}', "a record of type x/1"),
    ):
        (tmp_path / "other.json").write_text(content)
        with pytest.raises(RecordError, match=says):
            read_subject(str(tmp_path / "other.json"))
    with pytest.raises(RecordError, match="cannot be read"):
        read_subject(str(tmp_path / "absent.json"))
    with pytest.raises(RecordError, match="selects a model of a report"):
        read_subject("ref-llama", "ref-llama")
    with pytest.raises(RecordError, match="contains only planted-model"):
        read_subject(str(tmp_path / "sweep.json"), "another")


def test_a_report_of_several_models_needs_a_name_and_other_weights_are_refused(loaded, sequences, tmp_path: Path) -> None:
    model = loaded("llama")
    probe = probe_model(Session(model), sequences(*(64,) * 8), ProbeSettings(demonstration=False, scopes=("layer",)))
    other = probe.model_copy(update={"model": probe.model.model_copy(update={"name": "other", "sha256": "f" * 64})})
    path = tmp_path / "report.json"
    ReportRecord(probes=[probe, other]).save(path)
    with pytest.raises(RecordError, match=r"contains 2 models\. Choose one with `model`: tiny, other"):
        read_subject(str(path))
    with pytest.raises(RecordError, match="`model` third"):
        read_subject(str(path), "third")
    assert read_subject(str(path), "other") == other
    check_same_model(model, probe, str(path))
    assert probe.model.sha256 == fingerprint(model.model)
    with pytest.raises(ModelError, match="other weights or another configuration of other"):
        check_same_model(model, other, str(path))
    short = sequences(*(40,) * 18, seed=1)
    advice = recommend_model(
        Session(model), short, sequences(*(64,) * 40), LOOSE, PROTOCOL, RECIPE, **PCA, probe=probe, subject=str(path)
    )
    assert advice.subject == str(path)
    assert any(line.claim.startswith("probe: values") for line in advice.evidence)
