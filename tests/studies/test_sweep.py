"""A sweep says what ranks cost, takes up where it stopped, and refuses what cannot be measured."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from eigencache.calibration.session import Session
from eigencache.corpora.sequences import Sequences
from eigencache.errors import CodecError, CorpusError, ModelError, StatisticsError
from eigencache.fitting.pca import PCACalibration
from eigencache.fitting.pca_settings import PCASettings
from eigencache.records.quality import ReadingProtocol, SweepRecord
from eigencache.report.quality.sweep_plot import plot_sweep
from eigencache.report.quality.sweep_table import furthest, safety_table, sweep_table
from eigencache.studies.recommend.candidates import settings_of
from eigencache.studies.sweep import Plan, check_plans, control_plans, default_plans, needed_scopes, sweep_model
from stub_codecs import tiny_loaded
from tiny_models import tiny

PROTOCOL = ReadingProtocol(kind="prefix", length=20)


@pytest.fixture
def calibration(loaded, sequences) -> PCACalibration:
    return PCACalibration(Session(loaded("llama")), sequences(*(64,) * 12))


NO_SINKS = PCASettings("v", sinks=0)


@pytest.fixture
def text(sequences) -> Sequences:
    return sequences(*(40,) * 10, seed=1)


def swept(calibration: PCACalibration, text: Sequences, plans=None, **options) -> SweepRecord:
    plans = plans or [Plan(NO_SINKS, ranks=(2, 8, None)), Plan(NO_SINKS.of("kv"), bits=8, ranks=(8, None))]
    progress = {name: options.pop(name) for name in ("on_progress",) if name in options}
    session = Session(calibration.session.loaded, batch_size=4, **progress)
    return sweep_model(session, text, calibration, plans, PROTOCOL, **options)


def test_ratios_are_those_of_the_ranks_and_bits(calibration, text) -> None:
    values, both = swept(calibration, text).series
    assert [point.rank for point in values.points] == [2, 8, 16]
    assert [point.target_ratio for point in values.points] == pytest.approx([8, 2, 1])
    expected = [2 / (1 + rank / 16) for rank in (2, 8, 16)]
    assert [point.quality.compression_ratio for point in values.points] == pytest.approx(expected)
    scales = 20 * 8 / (20 * 8 + 4 * 8)  # 20 tokens of 8 coefficients in one group of scales
    assert both.points[0].target_ratio == pytest.approx(4 * scales)
    assert both.points[0].quality.compression_ratio == pytest.approx(4 * scales)


def test_first_tokens_are_counted_and_named_in_the_record(calibration, text) -> None:
    (series,) = swept(calibration, text, [Plan(PCASettings("v"), ranks=(2,))]).series
    assert series.sinks == 4 and settings_of(series) == PCASettings("v")
    assert series.points[0].target_ratio == pytest.approx(20 / (4 + 16 * 2 / 16))  # of a prefix of 20 tokens


def test_full_rank_costs_nothing_and_lower_ranks_diverge_more(calibration, text) -> None:
    values = swept(calibration, text).series[0]
    divergences = [point.quality.kl for point in values.points]
    assert divergences == sorted(divergences, reverse=True)
    assert abs(values.points[-1].quality.delta_nll) < 1e-4
    assert values.points[0].quality.delta_nll_interval is not None


def test_an_interrupted_sweep_continues_to_the_same_record(calibration, text, tmp_path: Path) -> None:
    path, calls = tmp_path / "partial", []

    def stop(what: str, done: int, of: int) -> None:
        calls.append(done)
        if done == 2 and len(calls) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        swept(calibration, text, partial=path, on_progress=stop)
    resumed = swept(calibration, text, partial=path, on_progress=lambda what, done, of: calls.append(done))
    assert calls == [0, 1, 2, 2, 3]
    assert resumed.series == swept(calibration, text).series


def test_a_record_survives_json_and_prints_and_plots(calibration, text, tmp_path: Path) -> None:
    record = swept(calibration, text)
    record.save(tmp_path / "sweep.json")
    assert SweepRecord.load(tmp_path / "sweep.json") == record
    table, safety = sweep_table(record), safety_table(record)
    assert len(table.rows) == 5
    assert [row[0] for row in safety.rows] == [series.name for series in record.series]
    assert len(plot_sweep(record).axes) == 2


def test_the_safest_ratio_is_the_largest_within_the_limit(calibration, text) -> None:
    points = swept(calibration, text).series[0].points
    losses = {2: 0.2, 8: 0.009, 16: 0.0}
    for point in points:
        point.quality.delta_nll = losses[point.rank]
        point.quality.delta_nll_interval = (0.0, 2 * losses[point.rank])
    assert (furthest(points, 0.01, certain=False) or points[0]).rank == 8
    assert (furthest(points, 0.01, certain=True) or points[0]).rank == 16
    assert furthest(points[:1], 0.01, certain=False) is None


def test_text_that_was_calibrated_on_is_refused_unless_forced(calibration) -> None:
    same = calibration.sequences
    with pytest.raises(CorpusError, match="100 % of the evaluation text"):
        swept(calibration, same)
    assert any("OVERLAP" in warning for warning in swept(calibration, same, force=True).warnings)


def test_a_rank_that_does_not_exist_is_refused(calibration, text) -> None:
    with pytest.raises(StatisticsError, match="`ranks` 17: v · head · frobenius · centered has ranks 1 to 16"):
        swept(calibration, text, [Plan(PCASettings("v"), ranks=(17,))])
    for rank in (0, -3):
        with pytest.raises(StatisticsError, match=f"`ranks` {rank}: v · head · frobenius · centered has ranks 1 to 16"):
            Plan(PCASettings("v"), ranks=(8, rank)).ranks_for(16)
    with pytest.raises(StatisticsError, match="`ranks` is empty"):
        Plan(PCASettings("v"), ranks=()).ranks_for(16)
    assert Plan(PCASettings("v"), ranks=(None, 8, 16)).ranks_for(16) == [8, 16]


@pytest.mark.parametrize(
    ("name", "length", "prefix", "memory", "error", "says"),
    [
        ("llama", 40, 39, 2**30, CorpusError, "every sequence has fewer than 41 tokens"),
        ("llama", 40, 20, 2**10, StatisticsError, "more than a `memory` of"),
        ("gpt2", 65, 20, 2**30, ModelError, "64 positions, but 65 tokens are needed"),
    ],
)
def test_a_text_that_cannot_be_scored_is_refused_before_anything_is_captured(
    name, length, prefix, memory, error, says, loaded, sequences
) -> None:
    session = Session(loaded(name), memory=memory)
    calibration = PCACalibration(session, sequences(*(64,) * 12))
    protocol = ReadingProtocol(kind="prefix", length=prefix)
    with pytest.raises(error, match=says):
        sweep_model(session, sequences(*(length,) * 4, seed=1), calibration, [Plan(NO_SINKS)], protocol)
    assert "captured" not in vars(calibration)


def test_plans_cover_every_target_and_keys_at_their_worst(loaded) -> None:
    settings = PCASettings("v", metric="fisher")
    assert [plan.settings.target for plan in default_plans(loaded("llama"), settings)] == ["v", "k", "kv", "k"]
    assert (
        default_plans(loaded("llama"), settings)[-1].settings.describe() == "k · head · post-RoPE · frobenius · uncentered"
    )
    assert [plan.settings.target for plan in default_plans(loaded("gpt2"), settings)] == ["v", "k", "kv"]
    assert [plan.settings.target for plan in default_plans(loaded("deepseek_v2"), settings)] == ["latent", "key_rope"]
    assert [plan.settings.basis for plan in control_plans(loaded("llama"))] == ["fitted", "pooled", "random"]
    assert needed_scopes([Plan(PCASettings("v", "all")), Plan(PCASettings("v", "head"))]) == ("head", "all")


def test_default_ranks_are_ten_steps_and_never_zero() -> None:
    assert Plan(PCASettings()).ranks_for(32) == [3, 6, 10, 13, 16, 19, 22, 26, 29, 32]
    assert Plan(PCASettings()).ranks_for(4) == [1, 2, 3, 4]
    assert np.all(np.diff(Plan(PCASettings()).ranks_for(7)) > 0)


def test_all_layers_of_a_wide_model_share_a_basis_of_as_many_directions_as_the_text_carries(loaded, sequences) -> None:
    config = copy.deepcopy(tiny("llama").config)
    config.num_hidden_layers = 48
    torch.manual_seed(0)
    session = Session(loaded(LlamaForCausalLM(config).eval()))
    calibration = PCACalibration(session, sequences(*(64,) * 40), scopes=("all",))
    plans = [Plan(PCASettings(target, "all", metric="fisher"), ranks=(2, 16, None)) for target in ("v", "kv")]
    record = sweep_model(
        session, sequences(*(48,) * 6, seed=1), calibration, plans, ReadingProtocol(kind="prefix", length=24)
    )
    for series in record.series:
        assert [point.rank for point in series.points] == [2, 16, series.width]
        losses = [point.quality.kl for point in series.points]
        assert losses == sorted(losses, reverse=True)
    notes = [line for line in record.warnings if "independent vectors carry a basis of" in line]
    assert len(notes) == 2, "one of keys and one of values, which both plans share"
    assert all("of 1,536 dimensions, 10 for each" in line for line in notes), notes


def test_an_unknown_metric_is_refused_before_any_text_is_read() -> None:
    with pytest.raises(StatisticsError, match="`metric` fischer does not exist"):
        check_plans(tiny_loaded("llama"), [Plan(PCASettings("v", metric="fischer"))])


@pytest.mark.parametrize(
    ("plan", "says"),
    [
        (Plan(PCASettings("values")), "`target` 'values' does not exist. Use one of k, v, kv, latent, key_rope"),  # type: ignore[arg-type]
        (Plan(PCASettings(scope="heads")), "`scope` 'heads' does not exist. Use one of head, layer, all"),  # type: ignore[arg-type]
        (Plan(PCASettings(frame="after")), "`frame` 'after' does not exist. Use one of pre, post"),  # type: ignore[arg-type]
        (Plan(PCASettings(basis="fit")), "`basis` 'fit' does not exist. Use one of fitted, pooled, random"),  # type: ignore[arg-type]
        (Plan(PCASettings(), bits=2), "`bits` 2 does not exist. Use one of 16, 8, 4"),  # type: ignore[arg-type]
    ],
)
def test_a_setting_that_does_not_exist_is_refused_with_those_that_do(plan: Plan, says: str) -> None:
    with pytest.raises(CodecError, match=says):
        check_plans(tiny_loaded("llama"), [plan])
