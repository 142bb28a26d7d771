"""Fitting `eigen`: bits near the bound, targets met with real containers, nothing fitted on what is kept apart."""

import functools
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from eigencache.calibration import metrics
from eigencache.calibration.calibration_set import CalibrationSet
from eigencache.calibration.metrics import metric_names
from eigencache.calibration.session import Session
from eigencache.calibration.vectors import SampledVectors
from eigencache.codec.eigen.codec import EigenCodec
from eigencache.codec.eigen.token_features import StoredFeatures
from eigencache.codec.eigen.transform import JointTransform
from eigencache.codec.layout import Layout, Part, by_layer
from eigencache.codec.sinks_and_window import FIRST_EXACT
from eigencache.corpora.resolve import read_text
from eigencache.corpora.sequences import pack
from eigencache.errors import BudgetError, StatisticsError
from eigencache.evaluate.likelihood import score_through_cache
from eigencache.fitting import eigen_search
from eigencache.fitting.eigen import Coefficients, EigenFit, EigenSettings, Point, fit_eigen, outstanding
from eigencache.fitting.eigen_basis import basis_of
from eigencache.fitting.eigen_search import at_bits, at_loss, fit_target
from eigencache.fitting.token_predictor import MAX_FEATURES, fit_text, previous, vocabulary
from eigencache.models.load import LoadedModel
from eigencache.models.tapped_cache import tapped_cache
from eigencache.records.quality import ReadingProtocol
from eigencache.spectral.metric import block_product
from stub_codecs import bundled, random_sequences, tiny_loaded

pytestmark = pytest.mark.slow

LAYOUT = Layout(tuple(Part(i, slot, (0, 2), 6) for slot in (0, 1) for i in range(2)), {})
WIDTH = LAYOUT.width
PLAIN = EigenSettings("joint", "frobenius", text=False, sinks=0, kept_bits=8, block=64)
DEFAULTS = EigenSettings()
LENGTHS = (40,) * 64
FITTED_ON, APART = 56, 8


def gaussian(n: int, seed: int) -> Tensor:
    """Vectors whose covariance has eigenvalues from 9 to 0.0004, turned at random."""
    rng = np.random.default_rng(seed)
    turn = np.linalg.qr(np.random.default_rng(9).normal(size=(WIDTH, WIDTH)))[0]
    return torch.from_numpy(rng.normal(size=(n, WIDTH)) * np.geomspace(3, 0.02, WIDTH) @ turn.T).float()


@functools.cache
def planted() -> EigenFit:
    x, held = gaussian(8_000, 0), gaussian(4_000, 1)
    mean = x.mean(0)
    basis, eigenvalues = basis_of(x - mean, 0, WIDTH, (), ())
    transform = JointTransform(mean, (basis,))
    fitted, apart = (Coefficients(transform.encode(part - mean, 1.0), None) for part in (x, held))
    return EigenFit(PLAIN, LAYOUT, transform, eigenvalues, None, None, 0, fitted, apart, None, torch.float32)  # type: ignore[arg-type]


def cached(vectors: Tensor) -> dict[int, tuple[Tensor, Tensor]]:
    return by_layer(LAYOUT.slots(vectors[None], 0), torch.float32)


def distortion(codec: EigenCodec) -> float:
    x = gaussian(2_000, 1)
    return float((LAYOUT.vectors(codec.decode(codec.encode(cached(x), 0)), 0)[0] - x).square().sum(1).mean())


def water_filling(eigenvalues: Tensor, total: float) -> float:
    """The least bits per vector at a total distortion (THEORY 6)."""
    low, high = 0.0, float(eigenvalues.max())
    for _ in range(100):
        level = (low + high) / 2
        low, high = (level, high) if float(eigenvalues.clamp(max=level).sum()) < total else (low, level)
    return float((0.5 * (eigenvalues / level).log2()).clamp_min(0).sum())


@pytest.mark.parametrize("step", [0.03, 0.1, 0.3, 1.0, 2.0])
def test_bits_are_near_the_bound_of_reverse_water_filling(step: float) -> None:
    point = planted().at_step(step)
    lost, coded = distortion(point.codec), point.codec.transform.coefficients
    bound = water_filling(planted().eigenvalues, lost)
    assert bound < point.coded_bits < 1.03 * bound + 0.254 * coded  # a quarter of a bit is the price of a scalar quantizer
    assert lost == pytest.approx(coded * step**2 / 12 + float(planted().eigenvalues[coded:].sum()), rel=0.35)


def test_a_finer_step_never_takes_fewer_bits_and_never_loses_more() -> None:
    points = [planted().at_step(3.0 / 2 ** (i / 2)) for i in range(14)]
    bits, lost = [p.coded_bits for p in points], [distortion(p.codec) for p in points]
    assert bits == sorted(bits) and lost == sorted(lost, reverse=True)
    kept = [p.codec.transform.coefficients for p in points]
    assert kept == sorted(kept) and kept[0] < WIDTH == kept[-1]


def test_coefficients_that_are_not_worth_their_bits_are_left_out_of_the_transform() -> None:
    fit = planted()
    codec = fit.at_step(1.0).codec
    kept = codec.transform.coefficients
    assert 0 < kept < WIDTH and codec.nbytes < fit.at_step(0.03).codec.nbytes
    assert float(fit.eigenvalues[kept]) < 1.0 < float(fit.eigenvalues[kept - 1]) * 12
    whole = fit.transform.bases[0]
    assert torch.equal(codec.transform.bases[0].rows, whole.rows[:kept])
    assert len(codec.quantizer.dead_zone) == len(codec.tables.table_of) == kept


def test_a_step_that_codes_nothing_is_refused() -> None:
    with pytest.raises(StatisticsError, match=r"no coefficient is worth a bit at the step 100. Use more `bits`"):
        planted().at_step(100.0)


@pytest.mark.parametrize("context", [256, 4096])
@pytest.mark.parametrize("bits", [0.7, 1.0, 2.0, 4.0, 8.0])
def test_a_target_in_bits_is_met_and_real_containers_agree(bits: float, context: int) -> None:
    point = at_bits(planted(), bits, context=context, name="mine")
    assert planted().bits_per_value(point, context) == pytest.approx(bits, rel=0.005)
    nbytes = point.codec.encode(cached(gaussian(4_000, 1)[:context]), 0).nbytes
    real = 8 * nbytes / (min(context, 4_000) * WIDTH)
    assert real == pytest.approx(bits, rel=0.03) and point.codec.name == "mine"


@pytest.mark.parametrize("bits", [1e-4, 100.0])
def test_a_target_that_no_step_meets_is_refused_with_what_can_be_had(bits: float) -> None:
    limit = "below the minimum of (.*) bits" if bits < 1 else "above the maximum of (.*) bits"
    remedy = r"Use \1 or more, or fewer `sinks`" if bits < 1 else r"Use \1 or less\."
    with pytest.raises(BudgetError, match=rf"{limit} per value at a context of 2,048 tokens\. {remedy}"):
        at_bits(planted(), bits)


def test_a_target_is_refused_where_coefficients_hold_rounding_and_a_vector_is_an_outlier() -> None:
    fit = planted()
    y = fit.fitted.y / fit.eigenvalues.sqrt().float() * torch.where(torch.arange(WIDTH) > 0, 1e-4, 3.0)
    far = y.clone()
    far[7, 0] = 500 * 3
    narrow = replace(
        fit,
        eigenvalues=y.double().square().mean(0),
        fitted=Coefficients(y, None),
        held_out_coefficients=Coefficients(far, None),
    )
    with pytest.raises(BudgetError, match="above the maximum of"):
        at_bits(narrow, 100.0)


def test_sinks_and_window_are_counted() -> None:
    fit = planted()
    kept = replace(fit, sinks=8, settings=replace(PLAIN, window=32))
    plain, dearer = (at_bits(one, 3.0, context=256) for one in (fit, kept))
    assert (dearer.codec.kept.sinks, dearer.codec.kept.window, dearer.codec.kept.bits) == (8, 32, 8)
    assert dearer.codec.step > plain.codec.step
    real = 8 * dearer.codec.encode(cached(gaussian(4_000, 1)[:256]), 0).nbytes / (256 * WIDTH)
    assert real == pytest.approx(3.0, rel=0.03)


def test_lanes_waste_next_to_nothing() -> None:
    few, many = (planted().at_step(step).codec for step in (2.0, 0.001))
    assert few.lanes < many.lanes


# Sinks


def samples_with(first: list[float], lengths: tuple[int, ...] = (60,) * 20) -> SampledVectors:
    """Vectors of size 1, at the first positions of the given sizes."""
    vectors = gaussian(sum(lengths), 3) / 3
    samples = SampledVectors(LAYOUT, vectors, torch.zeros(len(vectors), dtype=torch.int64), lengths)
    for position, size in enumerate(first):
        vectors[samples.positions == position] *= size
    return samples


@pytest.mark.parametrize(
    ("sizes", "sinks"),
    [([], 0), ([1.5, 1.5], 0), ([9], 1), ([20, 9, 3], 3), ([20, 1, 20], 0 + 1), ([1, 20], 0), ([9] * 30, 16)],
)
def test_sinks_are_the_first_positions_that_stand_out_without_a_gap(sizes: list[float], sinks: int) -> None:
    assert outstanding(samples_with(sizes), ()) == sinks


def test_what_costs_nothing_does_not_stand_out() -> None:
    samples = samples_with([])
    samples.vectors[samples.positions == 0, :6] *= 100
    cheap = torch.eye(6).expand(2, 6, 6).clone()
    cheap[0] *= 1e-3
    rest = torch.eye(6).expand(2, 6, 6)
    assert outstanding(samples, ()) == 1
    assert outstanding(samples, (cheap, rest, rest, rest)) == 0


def test_sequences_may_differ_in_length() -> None:
    assert outstanding(samples_with([9, 9], (60, 3, 1, 40, 2)), ()) == 2


# Text


def test_features_are_by_rank_and_centered_where_tokens_are_as_often_as_in_the_text() -> None:
    loaded, ids = tiny_loaded("llama"), torch.tensor([5] * 9 + [3] * 4 + [7])
    ranks, features = vocabulary(loaded, ids)
    assert ranks[[5, 3, 7]].tolist() == [0, 1, 2] and sorted(ranks.tolist()) == list(range(len(ranks)))
    assert features.vocabulary == len(ranks)
    torch.testing.assert_close(features.of(ranks[ids]).mean(0), torch.zeros(features.size), rtol=0, atol=2e-3)
    weights = loaded.model.get_input_embeddings().weight.detach()
    unit = torch.nn.functional.normalize(weights, dim=-1) * weights.shape[1] ** 0.5
    torch.testing.assert_close(features.of(ranks[[5]]) - features.of(ranks[[3]]), unit[[5]] - unit[[3]], rtol=0, atol=1e-2)


def test_wide_embeddings_are_cut_to_the_directions_that_the_text_uses() -> None:
    weight = torch.randn(300, 400, generator=torch.Generator().manual_seed(0))
    embedding = torch.nn.Embedding.from_pretrained(weight)
    own = SimpleNamespace(model=SimpleNamespace(get_input_embeddings=lambda: embedding), embedded_ids=300)
    ids = torch.arange(100).repeat(3)
    ranks, features = vocabulary(own, ids)  # type: ignore[arg-type]
    assert (features.vocabulary, features.size) == (300, MAX_FEATURES)
    unit = torch.nn.functional.normalize(weight, dim=-1) * 20
    distances, expected = (torch.cdist(x, x) for x in (features.of(ranks[:100]), unit[:100]))
    torch.testing.assert_close(distances, expected, rtol=1e-2, atol=0.1)  # a hundred tokens span less than 256


def test_the_token_before_is_that_of_the_same_sequence() -> None:
    features = torch.arange(1.0, 7)[:, None]
    assert previous(features, (3, 1, 2)).flatten().tolist() == [0, 1, 2, 0, 0, 5]


@pytest.mark.parametrize("weighed", [True, False])
def test_what_is_linear_in_the_tokens_is_predicted_and_its_tokens_found(weighed: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    features, here, before = draw(50, 8), draw(8, WIDTH), draw(8, WIDTH)
    before[:, :12] = before[:, 24:36] = 0  # what the first layer holds depends on the token alone
    lengths, block = (40,) * 50, 40
    ranks = torch.randint(50, (2000,), generator=generator)
    features = (features - features[ranks].mean(0)).half()
    f = features[ranks].float()
    x = f @ here + previous(f, lengths) @ before
    samples = SampledVectors(LAYOUT, x - x.mean(0), ranks, lengths)
    blocks = [torch.diag_embed(0.1 + draw(2, 6).abs()) for _ in LAYOUT.parts] if weighed else []
    text = fit_text(samples, ranks, StoredFeatures(features), blocks, [b.inverse() for b in blocks])
    rows = samples.vectors.view(50, 40, WIDTH)
    assert torch.equal(text.find(rows), ranks.view(50, 40))
    error = text.predict(ranks.view(50, 40), block) - rows
    assert float(error.square().mean() / rows.square().mean()) < 2e-3
    assert block_product(error, blocks).isfinite().all()


def test_what_tokens_say_nothing_of_is_predicted_as_next_to_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    ranks = torch.randint(50, (4000,), generator=generator)
    samples = SampledVectors(LAYOUT, gaussian(4000, 5), ranks, (40,) * 100)
    text = fit_text(samples, ranks, StoredFeatures(torch.randn(50, 8, generator=generator).half()), (), ())
    predicted = text.predict(ranks.view(100, 40), 40)
    assert float(predicted.square().mean() / samples.vectors.square().mean()) < 0.02


# Models


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
        EigenSettings("kind", "attention", 1.0, window=1, sinks=2, block=7),
    ],
    ids=EigenSettings.describe,
)
@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen2", "gemma2", "mistral", "deepseek_v2"])
def test_a_fine_step_changes_nothing_and_a_coarse_one_does(name: str, settings: EigenSettings) -> None:
    loaded, fit = fitted(name, settings)
    middle = float(fit.eigenvalues.median()) ** 0.5
    fine, coarse = fit.at_step(middle / 64), fit.at_step(2 * float(fit.eigenvalues.max()) ** 0.5 / 4)
    assert divergence(loaded, fine.codec) < 1e-4
    assert divergence(loaded, coarse.codec) > 5e-4  # of GPT-2 positions are left
    assert coarse.coded_bits < 0.5 * fine.coded_bits
    assert fit.layout.width == loaded.geometry.values_per_token


@pytest.mark.parametrize("name", ["llama", "mistral", "deepseek_v2"])
def test_tokens_are_found_in_what_the_first_layer_holds(name: str) -> None:
    loaded, fit = fitted(name)
    ids = torch.cat([torch.from_numpy(one) for one in random_sequences(*LENGTHS).ids[:FITTED_ON]])
    coded = ids.view(-1, 40)[:, FIRST_EXACT:].flatten()
    expected = vocabulary(loaded, coded)[0][coded]
    assert float((fit.fitted.ranks == expected).float().mean()) > 0.99


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


def test_nothing_is_fitted_on_held_out_sequences() -> None:
    text = random_sequences(*LENGTHS)
    ids = text.ids[:FITTED_ON] + [np.full(40, 9)] * APART
    loaded, fit = fitted("llama")
    other = fit_eigen(CalibrationSet(Session(loaded), replace(text, ids=ids)))
    assert [one.tolist() for one in fit.held_out.ids] == [one.tolist() for one in text.ids[FITTED_ON:]]
    assert (
        len(fit.fitted.y) == (40 - FIRST_EXACT) * FITTED_ON
        and len(fit.held_out_coefficients.y) == (40 - FIRST_EXACT) * APART
    )
    assert torch.equal(fit.fitted.y, other.fitted.y) and torch.equal(fit.eigenvalues, other.eigenvalues)
    step = float(fit.eigenvalues.median()) ** 0.5
    point, changed = fit.at_step(step), other.at_step(step)
    assert replace(point.codec, lanes=4).sha256 == replace(changed.codec, lanes=4).sha256
    assert point.coded_bits != changed.coded_bits


def test_settings_reach_the_codec() -> None:
    settings = EigenSettings("layer", "frobenius", text=False, sinks=5, window=6, kept_bits=16, block=9)
    loaded, fit = fitted("gpt2", settings)
    codec = fit.at_step(0.1, "mine").codec
    assert (codec.name, codec.kept.sinks, codec.kept.window, codec.kept.bits, codec.block) == ("mine", 5, 6, 16, 9)
    assert len(codec.transform.bases) == 6 and codec.text is None and codec.dtype == loaded.model.dtype
    assert fit.at_step(0.1).codec.name == settings.describe() == "eigen · layer · frobenius"
    assert EigenSettings().describe() == "eigen · joint · fisher^0.75 · text"
    assert len(fit.fitted.y) == 35 * FITTED_ON  # nothing is fitted on sinks


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
    assert (len(fit.fitted.y), len(fit.held_out_coefficients.y)) == (22 * (22 - len(longer)), 22 * len(longer))


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
    loaded, text = tiny_loaded("llama"), random_sequences(*[20] * 16)
    source = CalibrationSet(Session(loaded), text)
    assert not measured_
    for metric in ("frobenius", "attention", "fisher", "attention"):
        fit_eigen(source, EigenSettings(metric=metric, text=False))
    assert sorted(measured_) == ["attention", "fisher"]


# Loss


def stubbed(monkeypatch: pytest.MonkeyPatch, loss: Callable[[float], float]) -> list[float]:
    """Scores that are a function of the step; the steps that were scored."""
    seen: list[float] = []

    def score(_loaded, _apart, codecs: dict[str, EigenCodec], *_rest):
        seen.extend(codec.step for codec in codecs.values())
        return {name: SimpleNamespace(delta_nll=loss(codec.step)) for name, codec in codecs.items()}

    monkeypatch.setattr(eigen_search, "score_held_out", score)
    return seen


@pytest.mark.parametrize("allowed", [0.02, 0.1, 1.5])
def test_the_coarsest_step_within_a_loss_is_found_to_a_quarter_of_an_octave(monkeypatch, allowed: float) -> None:
    seen = stubbed(monkeypatch, lambda step: step)
    step = at_loss(planted(), Session(None), allowed).codec.step  # type: ignore[arg-type]
    assert step <= allowed < step * 2**0.25 * 1.001
    assert len(seen) <= 12


def test_a_loss_that_even_the_coarsest_step_keeps_gets_it(monkeypatch) -> None:
    seen = stubbed(monkeypatch, lambda step: 0.0)
    assert at_loss(planted(), Session(None), 0.1).codec.step == max(seen)  # type: ignore[arg-type]


def test_a_coarse_step_that_is_within_the_loss_by_luck_is_not_taken(monkeypatch) -> None:
    stubbed(monkeypatch, lambda step: 0.0 if step > 1 else step)
    assert at_loss(planted(), Session(None), 0.1).codec.step <= 0.1  # type: ignore[arg-type]


def test_a_loss_that_no_step_keeps_is_refused(monkeypatch) -> None:
    stubbed(monkeypatch, lambda step: 0.25)
    with pytest.raises(BudgetError, match=r"`max_nll`=0\.1 nats cannot be met: the finest step loses 0\.2500 nats"):
        at_loss(planted(), Session(None), 0.1)  # type: ignore[arg-type]


def test_a_loss_is_kept_on_the_held_out_sequences_and_a_size_comes_with_its_loss() -> None:
    loaded, fit = fitted("llama", EigenSettings("head", "frobenius", text=False, sinks=0))
    fine, coarse = (fit_target(fit, Session(loaded), max_nll=allowed, context=40) for allowed in (1e-3, 0.05))
    assert fine.codec.step < coarse.codec.step and fine.expected.bits_per_value > coarse.expected.bits_per_value
    assert fine.expected.delta_nll <= 1e-3 and coarse.expected.delta_nll <= 0.05
    scored = sum(len(ids) // 2 - 1 for ids in fit.held_out.ids)
    assert fine.expected.tokens == scored and fine.expected.context == 40
    sized = fit_target(fit, Session(loaded), bits=coarse.expected.bits_per_value, context=40)
    assert sized.expected.bits_per_value == pytest.approx(coarse.expected.bits_per_value, rel=0.01)
    assert sized.expected.delta_nll == pytest.approx(coarse.expected.delta_nll, abs=0.02)


@pytest.mark.parametrize("targets", [{}, {"bits": 1.0, "max_nll": 0.1}])
def test_one_target_is_asked_for(targets: dict[str, float]) -> None:
    with pytest.raises(BudgetError, match="Give exactly one of `bits` and `max_nll`"):
        fit_target(planted(), Session(None), **targets)  # type: ignore[arg-type]
