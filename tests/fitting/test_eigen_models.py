"""Fitting `eigen` to models: exact at fine steps, sizes met by containers, nothing fitted on held-out sequences."""

import functools
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from eigencache.calibration import calibration_set, metrics
from eigencache.calibration.calibration_set import CalibrationSet
from eigencache.calibration.metrics import metric_names
from eigencache.calibration.session import Session
from eigencache.codec.eigen.codec import EigenCodec
from eigencache.codec.sinks_and_window import FIRST_EXACT
from eigencache.corpora.resolve import read_text
from eigencache.corpora.sequences import Sequences, pack
from eigencache.errors import StatisticsError
from eigencache.evaluate.likelihood import score_through_cache
from eigencache.fitting.eigen import EigenFit, EigenSettings, Point, fit_eigen
from eigencache.fitting.eigen_search import at_bits, fit_target
from eigencache.fitting.token_predictor import vocabulary
from eigencache.models.load import LoadedModel
from eigencache.models.tapped_cache import tapped_cache
from eigencache.records.quality import ReadingProtocol
from stub_codecs import bundled, random_sequences, tiny_loaded

pytestmark = pytest.mark.slow

DEFAULTS = EigenSettings()
LENGTHS = (40,) * 64
FITTED, APART, HELD_OUT = 49, 7, 8


@functools.cache
def fitted(name: str, settings: EigenSettings = DEFAULTS) -> tuple[LoadedModel, EigenFit]:
    loaded = tiny_loaded(name)
    return loaded, fit_eigen(CalibrationSet(Session(loaded), random_sequences(*LENGTHS)), settings)


def divergence(loaded: LoadedModel, codec: EigenCodec) -> float:
    protocol = ReadingProtocol(kind="chunked", length=10, window=3)
    scored = list(score_through_cache(Session(loaded), random_sequences(40, 40, seed=1), {"codec": codec}, protocol))
    losses = [loss for batch in scored for loss in batch.losses["codec"]]
    return sum(loss.kl for loss in losses) / sum(loss.tokens for loss in losses)


@pytest.mark.parametrize(
    "settings",
    [
        DEFAULTS,
        EigenSettings("head", "frobenius", text=False, sinks=3, kept_bits=16),
        EigenSettings("groups", text=False, group=2, amortize=10**9),
        EigenSettings("groups", "attention", 1.0, window=1, sinks=2, block=7, group=1),
    ],
    ids=EigenSettings.describe,
)
@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen2", "gemma2", "mistral", "deepseek_v2"])
def test_a_fine_step_changes_nothing_and_a_coarse_one_does(name: str, settings: EigenSettings) -> None:
    loaded, fit = fitted(name, settings)
    fine, coarse = fit.at_step(fit.spread / 256), fit.at_step(fit.spread)
    assert divergence(loaded, fine.codec) < 1e-4
    assert divergence(loaded, coarse.codec) > 5e-4  # of GPT-2 positions are left
    assert coarse.coded_bits < 0.5 * fine.coded_bits
    assert fit.layout.width == loaded.geometry.values_per_token


@pytest.mark.parametrize("name", ["llama", "mistral", "deepseek_v2"])
def test_tokens_are_found_in_what_the_first_layer_holds(name: str) -> None:
    loaded, fit = fitted(name)
    ids = torch.cat([torch.from_numpy(one) for one in random_sequences(*LENGTHS).ids])
    coded = ids.view(-1, 40)[:, FIRST_EXACT:].split([FITTED, APART, HELD_OUT])
    rank_of = vocabulary(loaded, coded[0].flatten())[0]
    for source, some in zip((fit.fitted, fit.apart, fit.held), coded, strict=True):
        assert source.ranks is not None
        assert float((source.ranks == rank_of[some.flatten()]).float().mean()) > 0.99


def real_bits(loaded: LoadedModel, fit: EigenFit, point: Point, context: int) -> float:
    """Bits per value of containers of the first `context` tokens of the sequences kept apart."""
    total = 0
    for ids in fit.held_out.ids:
        cache, stored = tapped_cache(loaded.model)
        with torch.no_grad():
            loaded.model(input_ids=torch.from_numpy(ids[:context])[None], past_key_values=cache, use_cache=True)
        total += point.codec.encode(stored, 0).nbytes
    return 8 * total / (len(fit.held_out.ids) * context * fit.layout.width)


@pytest.mark.parametrize("name", ["llama", "deepseek_v2"])
def test_targets_are_met_by_containers_of_a_model(name: str) -> None:
    loaded, fit = fitted(name)
    point = at_bits(fit, 6.0, context=40)
    assert real_bits(loaded, fit, point, 40) == pytest.approx(6.0, rel=0.03)


def test_targets_are_met_by_containers_of_real_text() -> None:
    loaded = bundled("ref-llama")
    text = pack(read_text("stdlib"), loaded.tokenizer, tokens=16 * 256, max_length=256)
    fit = fit_eigen(CalibrationSet(Session(loaded), text), EigenSettings(metric="frobenius"))
    point = at_bits(fit, 2.0, context=256)
    assert real_bits(loaded, fit, point, 256) == pytest.approx(2.0, rel=0.03)


def with_other(text: Sequences, sequences: slice) -> Sequences:
    """The text with other tokens in some sequences."""
    ids = list(text.ids)
    ids[sequences] = [np.full(40, 9)] * len(ids[sequences])
    return replace(text, ids=ids)


def test_nothing_is_fitted_on_held_out_sequences() -> None:
    text = random_sequences(*LENGTHS)
    loaded, fit = fitted("llama")
    other = fit_eigen(CalibrationSet(Session(loaded), with_other(text, slice(FITTED + APART, None))))
    assert [one.tolist() for one in fit.held_out.ids] == [one.tolist() for one in text.ids[FITTED + APART :]]
    point, changed = fit.at_step(fit.spread / 4), other.at_step(fit.spread / 4)
    assert replace(point.codec, lanes=4).sha256 == replace(changed.codec, lanes=4).sha256
    assert point.coded_bits != changed.coded_bits


@pytest.mark.parametrize("settings", [DEFAULTS, EigenSettings("joint", "frobenius"), EigenSettings(group=1, text=False)])
def test_basis_predictions_and_text_are_fitted_on_some_sequences_and_quantizer_and_tables_on_others(
    settings: EigenSettings,
) -> None:
    text = random_sequences(*LENGTHS)
    fit = fitted("llama", settings)[1]
    ids = text.ids
    for source, part in zip(
        (fit.fitted, fit.apart, fit.held), (ids[:FITTED], ids[FITTED : FITTED + APART], ids[FITTED + APART :]), strict=True
    ):
        expected = np.concatenate([one[FIRST_EXACT:] for one in part])
        assert source.vectors.ids.tolist() == expected.tolist() and len(source.vectors) == len(expected)
        assert source.vectors.mean is fit.fitted.vectors.mean
    mean = fit.fitted.vectors.samples.vectors(fit.fitted.vectors.rows).double().mean(0).float()
    torch.testing.assert_close(fit.fitted.vectors.mean, mean, rtol=0, atol=1e-5)
    changed = replace(fit, apart=fit.held, sizes={}, _bases={}).at_step(fit.spread / 4).codec
    codec = fit.at_step(fit.spread / 4).codec
    stages = zip(codec.transform.stages, changed.transform.stages, strict=True)
    first, other = next(stages)
    kept = min(len(first), len(other)) // 2
    torch.testing.assert_close(first.rows[:kept], other.rows[:kept], rtol=0, atol=1 / 250)  # the rows, but for rounding
    assert not np.array_equal(codec.tables.starts, changed.tables.starts)


def test_settings_reach_the_codec() -> None:
    settings = EigenSettings("layer", "frobenius", text=False, sinks=5, window=6, kept_bits=16, block=9)
    loaded, fit = fitted("gpt2", settings)
    codec = fit.at_step(0.1, "mine").codec
    assert (codec.name, codec.kept.sinks, codec.kept.window, codec.kept.bits, codec.block) == ("mine", 5, 6, 16, 9)
    assert len(codec.transform.stages) == 6 and codec.text is None and codec.dtype == loaded.model.dtype
    assert fit.at_step(0.1).codec.name == settings.describe() == "eigen · layer · frobenius"
    assert len(fit.fitted.vectors) == 35 * FITTED  # nothing is fitted on sinks


@pytest.mark.parametrize(("group", "stages"), [(1, 3), (2, 2), (3, 1), (8, 1)])
def test_groups_of_layers_become_stages_and_only_the_first_is_predicted_from_tokens(group: int, stages: int) -> None:
    loaded, fit = fitted("llama", EigenSettings(group=group))
    codec = fit.at_step(fit.spread / 4).codec
    width = loaded.geometry.values_per_token // len(loaded.geometry.layers)
    assert [stage.stop for stage in codec.transform.stages] == [min(3, group * (i + 1)) * width for i in range(stages)]
    assert [stage.prediction is None for stage in codec.transform.stages] == [True] + [False] * (stages - 1)
    assert codec.text is not None and codec.text.rows.shape[1] == codec.transform.stages[0].stop
    assert fit.fitted.first is not None and fit.fitted.first.shape[1] == codec.transform.stages[0].stop


def test_the_spread_is_the_root_of_the_mean_square_of_the_weighed_vectors() -> None:
    fit = fitted("llama")[1]
    z = fit.fitted.vectors.columns(0, fit.layout.width).double()
    assert fit.spread == pytest.approx(float(z.square().mean().sqrt()), rel=1e-6)


def test_few_stored_tokens_make_the_codec_smaller() -> None:
    sizes = []
    for amortize in (10**3, 10**5, 10**9):
        fit = fitted("llama", EigenSettings(amortize=amortize))[1]
        codec = fit.at_step(fit.spread / 4).codec
        sizes.append((codec.transform.coefficients, codec.nbytes))
    assert sizes == sorted(sizes) and sizes[0][0] < sizes[-1][0] and sizes[0][1] < sizes[-1][1]


def test_too_little_text_is_refused() -> None:
    with pytest.raises(StatisticsError, match="15 sequences are too few: 16 are needed"):
        fit_eigen(CalibrationSet(Session(tiny_loaded("llama")), random_sequences(*[20] * 15)))
    with pytest.raises(StatisticsError, match="No sequence is longer than 20 sinks"):
        fit_eigen(
            CalibrationSet(Session(tiny_loaded("llama")), random_sequences(*[20] * 16)),
            EigenSettings(metric="frobenius", sinks=20),
        )


def test_sequences_no_longer_than_the_sinks_say_nothing() -> None:
    text = random_sequences(*[30, 30, 8] * 11)
    fit = fit_eigen(CalibrationSet(Session(tiny_loaded("llama")), text), EigenSettings(metric="frobenius", sinks=8))
    longer = [len(ids) for ids in fit.held_out.ids if len(ids) > 8]
    assert 0 < len(longer) < len(fit.held_out.ids)
    coded = [len(source.vectors) for source in (fit.fitted, fit.apart, fit.held)]
    assert coded[0] + coded[1] == 22 * (22 - len(longer)) and coded[2] == 22 * len(longer)
    assert all(length == 22 for source in (fit.fitted, fit.apart, fit.held) for length in source.vectors.lengths)


# Metrics


@pytest.mark.parametrize("name", ["llama", "gpt2", "deepseek_v2", "gemma2"])
def test_frobenius_has_no_blocks_and_attention_has_the_trace_of_fisher(name: str) -> None:
    source = CalibrationSet(Session(tiny_loaded(name)), random_sequences(*[20] * 16))
    assert source.metric("frobenius") == []
    fisher, attention = source.metric("fisher"), source.metric("attention")
    for part, f, a in zip(source.samples.layout.parts, fisher, attention, strict=True):
        assert f.shape == a.shape == (part.heads[1], part.dim, part.dim)
        traces = [x.diagonal(dim1=-2, dim2=-1).sum(-1) for x in (f, a)]
        torch.testing.assert_close(*traces, rtol=1e-6, atol=1e-30)
    assert not torch.allclose(fisher[0], attention[0], rtol=1e-2, atol=0)


def test_a_metric_is_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    measured_: list[str] = []

    def counted(name: str, measure: Callable) -> Callable:
        return lambda *args, **options: measured_.append(name) or measure(*args, **options)

    metric_names()  # registers all
    for name, metric in list(metrics._MEASURES.items()):
        monkeypatch.setitem(metrics._MEASURES, name, replace(metric, measure=counted(name, metric.measure)))
    monkeypatch.setattr(calibration_set, "measure_fisher", counted("fisher", calibration_set.measure_fisher))
    loaded, text = tiny_loaded("llama"), random_sequences(*[20] * 16)
    source = CalibrationSet(Session(loaded), text)
    assert not measured_
    for metric in ("frobenius", "attention", "fisher", "attention"):
        fit_eigen(source, EigenSettings(metric=metric, text=False))
    assert sorted(measured_) == ["attention", "fisher"]


# Loss


def test_a_loss_is_kept_on_the_held_out_sequences_and_a_size_comes_with_its_loss() -> None:
    loaded, fit = fitted("llama", EigenSettings("head", "frobenius", text=False, sinks=0))
    fine, coarse = (fit_target(fit, Session(loaded), max_nll=allowed, context=40) for allowed in (1e-3, 0.05))
    assert fine.codec.step < coarse.codec.step and fine.expected.bits_per_value > coarse.expected.bits_per_value
    assert fine.expected.delta_nll <= 1e-3 and coarse.expected.delta_nll <= 0.05
    assert fine.expected.kl <= 1e-3 and coarse.expected.kl <= 0.05
    scored = sum(len(ids) // 2 - 1 for ids in fit.held_out.ids)
    assert fine.expected.tokens == scored and fine.expected.context == 40
    sized = fit_target(fit, Session(loaded), bits=coarse.expected.bits_per_value, context=40)
    assert sized.expected.bits_per_value == pytest.approx(coarse.expected.bits_per_value, rel=0.01)
    assert sized.expected.delta_nll == pytest.approx(coarse.expected.delta_nll, abs=0.02)
