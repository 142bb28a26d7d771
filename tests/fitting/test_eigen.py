"""Fitting `eigen` to drawn vectors: bits near the bound, layers predicted from layers, nothing fitted on held-out ones."""

import functools
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from eigencache.codec.eigen.codec import EigenCodec
from eigencache.codec.eigen.entropy_tables import fit_tables
from eigencache.codec.eigen.quantizer import LAMBDA
from eigencache.codec.layout import Layout, Part
from eigencache.errors import CodecError, StatisticsError
from eigencache.fitting.eigen import EigenFit, EigenSettings, Point
from eigencache.fitting.eigen_stage import basis_of
from eigencache.spectral.metric import block_product
from planted_eigen import DEVIATIONS, PLAIN, WIDTH, cached, decoded, fit_of, gaussian, planted

pytestmark = pytest.mark.slow


def distortion(codec: EigenCodec) -> float:
    x = gaussian(2_000, 1)
    return float((decoded(codec, x) - x).square().sum(1).mean())


def water_filling(eigenvalues: np.ndarray, total: float) -> float:
    """The least bits per vector at a total distortion (THEORY 6)."""
    low, high = 0.0, float(eigenvalues.max())
    for _ in range(100):
        level = (low + high) / 2
        low, high = (level, high) if np.minimum(eigenvalues, level).sum() < total else (low, level)
    return float((0.5 * np.log2(eigenvalues / level)).clip(0).sum())


@pytest.mark.parametrize("step", [0.03, 0.1, 0.3, 1.0, 2.0])
def test_bits_are_near_the_bound_of_reverse_water_filling(step: float) -> None:
    point = planted().at_step(step)
    lost, coded = distortion(point.codec), point.codec.transform.coefficients
    bound = water_filling(DEVIATIONS**2, lost)
    assert bound < point.coded_bits < 1.03 * bound + 0.254 * coded  # a quarter of a bit is the price of a scalar quantizer
    assert lost == pytest.approx(coded * step**2 / 12 + float((DEVIATIONS[coded:] ** 2).sum()), rel=0.35)


def test_a_finer_step_never_takes_fewer_bits_and_never_loses_more() -> None:
    points = [planted().at_step(3.0 / 2 ** (i / 2)) for i in range(14)]
    bits, lost = [p.coded_bits for p in points], [distortion(p.codec) for p in points]
    assert bits == sorted(bits) and lost == sorted(lost, reverse=True)
    kept = [p.codec.transform.coefficients for p in points]
    assert kept == sorted(kept) and kept[0] < WIDTH == kept[-1]


def test_coefficients_that_are_not_worth_their_bits_are_left_out_of_the_transform() -> None:
    codec = planted().at_step(1.0).codec
    kept = codec.transform.coefficients
    assert 0 < kept < WIDTH and codec.nbytes < planted().at_step(0.03).codec.nbytes
    assert DEVIATIONS[kept] ** 2 < 1.0 < DEVIATIONS[kept - 1] ** 2 * 12
    basis = basis_of(planted().fitted.vectors.columns(0, WIDTH))
    torch.testing.assert_close(codec.transform.stages[0].rows, basis.mT[:kept], rtol=0, atol=1 / 250)
    assert len(codec.quantizer.dead_zone) == len(codec.tables.table_of) == kept


def test_a_step_that_codes_nothing_is_refused() -> None:
    with pytest.raises(StatisticsError, match=r"no coefficient is worth a bit at the step 100. Use more `bits`"):
        planted().at_step(100.0)


def test_sinks_and_window_reach_the_codec() -> None:
    kept = replace(planted(), sinks=8, settings=replace(PLAIN, window=32)).at_step(0.3, "mine").codec
    assert (kept.name, kept.kept.sinks, kept.kept.window, kept.kept.bits, kept.block) == ("mine", 8, 32, 8, 64)


def test_lanes_waste_next_to_nothing() -> None:
    few, many = (planted().at_step(step).codec for step in (2.0, 0.001))
    assert few.lanes < many.lanes
    for codec in (few, many):
        data = codec.encode(cached(gaussian(64 * 20, 1)), 0).nbytes
        assert codec.lanes == 4 or 20 * 2 * codec.lanes < 0.01 * data


@pytest.mark.parametrize("step", [0.1, 1.0])
def test_the_bits_are_those_of_containers_of_the_held_out_vectors(step: float) -> None:
    point, x = planted().at_step(step), gaussian(4_000, 1)
    tokens, bits = point.codec.cost(point.codec.encode(cached(x), 0).rows[0])
    states = 16 * point.codec.lanes / 64  # of a state of 32 bits 16 are data
    assert tokens == 4_000 and 0.99 * bits < point.coded_bits < 1.01 * (bits + states)


# Side information


def cost_of(point: Point, x: Tensor) -> float:
    """Bits of a token, and its distortion at the exchange rate of the quantizer."""
    lost = float((decoded(point.codec, x) - x).square().sum(1).mean())
    return point.coded_bits + lost / point.codec.step**2 / LAMBDA


def row_nbytes(codec: EigenCodec) -> list[int]:
    """Bytes of every row of D with its scale and its numbers of the quantizer."""
    (stage,) = codec.transform.stages
    return [(2 if i < len(stage.fine) else 1) * WIDTH + 20 for i in range(len(stage))]


def test_what_costs_more_than_it_saves_over_the_stored_tokens_is_left_out() -> None:
    step, bits = 0.1, {}
    for tokens in (30, 100, 1_000, 10**4, 10**6, 10**9):
        point = planted(tokens).at_step(step)
        assert len(row_nbytes(point.codec)) == point.codec.transform.coefficients
        bits[tokens] = (row_nbytes(point.codec), point.codec.nbytes, cost_of(point, gaussian(2_000, 1)))
    rows, sizes, costs = zip(*bits.values(), strict=True)
    assert list(sizes) == sorted(sizes) and list(costs) == sorted(costs, reverse=True)
    assert len(rows[0]) < 0.7 * len(rows[-1])
    for tokens, (own, _, cost) in bits.items():  # with its share of the rows, what is fitted for so many is the cheapest
        for others, _, other in bits.values():
            assert cost + 8 * sum(own) / tokens < 1.01 * (other + 8 * sum(others) / tokens)


def test_the_default_is_a_million_tokens() -> None:
    assert EigenSettings().amortize == 10**6 and EigenSettings().group == 3 and EigenSettings().scope == "groups"


# Layers predicted from layers


LAYERS, DIM = 6, 8
CHAIN = Layout(tuple(Part(i, slot, (0, 1), DIM // 2) for i in range(LAYERS) for slot in (0, 1)), {})
NOISE = 0.05


def chain(n: int, seed: int) -> Tensor:
    """Layers that are the layer before, turned, plus noise; the first has deviation 1."""
    generator = torch.Generator().manual_seed(seed)
    layers = [torch.randn(n, DIM, generator=generator)]
    for i in range(1, LAYERS):
        turn = torch.linalg.qr(torch.randn(DIM, DIM, generator=torch.Generator().manual_seed(i))).Q
        layers.append(layers[-1] @ turn + NOISE * torch.randn(n, DIM, generator=generator))
    return torch.cat(layers, 1)


@functools.cache
def chained(scope: str, group: int = 1) -> EigenFit:
    settings = replace(PLAIN, scope=scope, group=group)
    return fit_of(chain(8_000, 0), chain(8_000, 2), chain(4_000, 1), settings, CHAIN)


def errors(point: Point) -> Tensor:
    """Mean squared error of every layer."""
    x = chain(2_000, 1)
    return (decoded(point.codec, x) - x).square().mean(0).view(LAYERS, DIM).mean(1)


@pytest.mark.parametrize("step", [0.01, 0.03])
def test_a_layer_takes_the_bits_of_what_the_one_before_does_not_say(step: float) -> None:
    predicted, alone = (chained(scope).at_step(step) for scope in ("groups", "layer"))
    lost = step**2 / 12
    first, later = (0.5 * np.log2(variance / lost) + 0.254 for variance in (1 + lost, NOISE**2 + 2 * lost))
    ideal = DIM * (first + (LAYERS - 1) * later)
    assert predicted.coded_bits == pytest.approx(ideal, rel=0.05)
    assert predicted.coded_bits < 0.6 * alone.coded_bits
    assert alone.coded_bits == pytest.approx(DIM * LAYERS * first, rel=0.02)
    assert float(errors(predicted).mean()) < 1.1 * float(errors(alone).mean())


@pytest.mark.parametrize("group", [1, 2, 4])
@pytest.mark.parametrize("step", [0.03, 0.3])
def test_errors_do_not_add_up_from_layer_to_layer(step: float, group: int) -> None:
    lost = errors(chained("groups", group).at_step(step))
    assert float(lost[-1]) < 1.2 * float(lost[0]) + NOISE**2 * 2 and float(lost.max()) < step**2 / 6  # draws differ by CPU


def test_only_groups_of_layers_are_predicted_and_only_from_the_group_before() -> None:
    for scope, group, count in (("head", 1, 12), ("layer", 1, 12), ("joint", 1, 1), ("groups", 1, 6), ("groups", 4, 2)):
        stages = chained(scope, group).at_step(0.1).codec.transform.stages
        assert len(stages) == count
        predicted = [stage.prediction is not None for stage in stages]
        assert predicted == ([False] + [True] * (count - 1) if scope == "groups" else [False] * count)
        for before, stage in pairwise(stages):
            assert before.stop == stage.start
            if stage.prediction is not None:
                assert stage.prediction.weights.shape == (before.stop - before.start, stage.stop - stage.start)


@pytest.mark.parametrize("group", [6, 7, 100])
def test_a_group_of_all_layers_is_joint_without_prediction(group: int) -> None:
    one, joint = (chained(scope, group).at_step(0.1) for scope in ("groups", "joint"))
    assert len(one.codec.transform.stages) == 1 and one.codec.transform.stages[0].prediction is None
    assert one.codec.sha256 == joint.codec.sha256 and one.coded_bits == joint.coded_bits


def test_planted_turns_are_the_weights() -> None:
    stages = chained("groups").at_step(0.01).codec.transform.stages
    for i, stage in enumerate(stages[1:], 1):
        turn = torch.linalg.qr(torch.randn(DIM, DIM, generator=torch.Generator().manual_seed(i))).Q
        assert stage.prediction is not None
        torch.testing.assert_close(stage.prediction.weights, turn, rtol=0, atol=0.015)


# What is fitted on what


def test_nothing_is_fitted_on_held_out_vectors() -> None:
    held = fit_of(chain(3_000, 0), chain(3_000, 2), 2 * chain(3_000, 1), chained("groups").settings, CHAIN)
    other = fit_of(chain(3_000, 0), chain(3_000, 2), chain(3_000, 1), chained("groups").settings, CHAIN)
    one, two = held.at_step(0.1), other.at_step(0.1)
    assert replace(one.codec, lanes=4).sha256 == replace(two.codec, lanes=4).sha256 and one.coded_bits > two.coded_bits


@pytest.mark.parametrize("scope", ["groups", "joint"])
def test_quantizer_and_tables_are_fitted_on_vectors_that_the_basis_has_not_seen(scope: str) -> None:
    settings = replace(PLAIN, scope=scope, group=2)
    fit = fit_of(chain(60, 0), chain(3_000, 2), chain(3_000, 1), settings, CHAIN)
    codec = fit.at_step(0.05).codec
    symbols = codec.transform.quantize(fit.apart.vectors.columns(0, CHAIN.width), 0.05, codec.quantizer)
    tables = fit_tables(symbols.T.contiguous().numpy(), codec.tables.table_of)
    for name in ("shifts", "halves", "starts"):
        assert np.array_equal(getattr(tables, name), getattr(codec.tables, name))
    overfitted = fit_of(chain(60, 0), chain(60, 0), chain(3_000, 1), settings, CHAIN).at_step(0.05)
    x = chain(3_000, 1)
    assert cost_of(fit.at_step(0.05), x) < 0.97 * cost_of(overfitted, x)


# The metric


@functools.cache
def weighed(step: float) -> Point:
    """A fit in a metric by which the first head matters 100 times as much as the others."""
    inverses = [torch.eye(6).expand(2, 6, 6).clone() for _ in range(4)]
    inverses[0][0] *= 0.1
    return fit_of(gaussian(8_000, 0), gaussian(8_000, 2), gaussian(4_000, 1), inverses=inverses).at_step(step)


def test_errors_are_even_in_the_metric() -> None:
    x = gaussian(2_000, 1)
    codec = weighed(0.02).codec
    error = decoded(codec, x) - x
    by_head = error.square().mean(0).view(-1, 6).mean(1)
    assert float(by_head[0]) == pytest.approx(0.01 * float(by_head[1:].mean()), rel=0.5)
    z = block_product(error, tuple(torch.linalg.inv(b.float()) for b in codec.transform.inverse_roots))
    assert float(z.square().mean()) < 0.02**2 / 8


def test_blocks_of_the_metric_are_stored_in_16_bits() -> None:
    assert {b.dtype for b in weighed(0.3).codec.transform.inverse_roots} == {torch.float16}
    ill = [torch.diag(torch.logspace(-3, 0, 6)).expand(2, 6, 6).clone() for _ in range(4)]
    fit = fit_of(gaussian(2_000, 0), gaussian(2_000, 2), gaussian(2_000, 1), inverses=ill)
    codec = fit.at_step(fit.spread / 3_000).codec
    assert {b.dtype for b in codec.transform.inverse_roots} == {torch.float32}
    x = gaussian(500, 1)
    assert float((decoded(codec, x) - x).square().mean() / x.square().mean()) < 1e-3


# Settings


def test_settings_describe_themselves() -> None:
    assert EigenSettings().describe() == "eigen · groups of 3 · fisher^0.75 · text"
    assert EigenSettings("layer", "frobenius", text=False).describe() == "eigen · layer · frobenius"
    assert EigenSettings(alpha=1, group=1).describe() == "eigen · groups of 1 · fisher · text"


@pytest.mark.parametrize(("name", "value"), [("scope", "kind"), ("kept_bits", 4)])
def test_unknown_settings_are_refused(name: str, value: object) -> None:
    with pytest.raises(CodecError, match=rf"`{name}` {value} does not exist. Use one of"):
        EigenSettings(**{name: value})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "value", "least"),
    [("group", 0, 1), ("amortize", -5, 1), ("block", 0, 1), ("window", -1, 0), ("sinks", -4, 0), ("alpha", -0.5, 0)],
)
def test_numbers_below_their_least_value_are_refused(name: str, value: float, least: int) -> None:
    with pytest.raises(CodecError, match=f"`{name}`={value} must be at least {least}"):
        EigenSettings(**{name: value})  # type: ignore[arg-type]


def test_an_unknown_metric_is_refused_with_the_settings() -> None:
    with pytest.raises(StatisticsError, match="metric"):
        EigenSettings(metric="hessian")
