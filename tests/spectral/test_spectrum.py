"""Every statistic equals its formula in NumPy float64, and is recovered from data constructed to have it."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eigencache.spectral import spectrum as sp
from simulated import moments_of, planted, repeatable, rotation, white

Spectra = st.lists(st.floats(0, 1e6), min_size=1, max_size=40).filter(lambda values: max(values) > 1e-3)


def descending(values: list[float]) -> torch.Tensor:
    return torch.tensor(sorted(values, reverse=True), dtype=torch.float64)


def entropy_rank(weights: np.ndarray) -> float:
    shares = weights / weights.sum()
    return math.exp(-sum(share * math.log(share) for share in shares if share))


def rank_in_numpy(share: float) -> Callable[[np.ndarray], int]:
    return lambda values: next(r for r in range(1, len(values) + 1) if values[:r].sum() / values.sum() >= share - 1e-12)


FORMULAS: dict[str, tuple[Callable, Callable[[np.ndarray], float]]] = {
    "effective rank": (sp.effective_rank, lambda values: entropy_rank(np.sqrt(values))),
    "effective rank of eigenvalues": (sp.effective_rank_eigen, entropy_rank),
    "participation ratio": (sp.participation_ratio, lambda values: values.sum() ** 2 / (values**2).sum()),
    "stable rank": (sp.stable_rank, lambda values: values.sum() / values.max()),
    "rank at 90 %": (lambda values: sp.rank_at(values, 0.90), rank_in_numpy(0.90)),
    "rank at 95 %": (lambda values: sp.rank_at(values, 0.95), rank_in_numpy(0.95)),
    "rank at 99 %": (lambda values: sp.rank_at(values, 0.99), rank_in_numpy(0.99)),
}
statistics = pytest.mark.parametrize(("statistic", "formula"), FORMULAS.values(), ids=FORMULAS)


@statistics
@repeatable
@given(Spectra)
def test_a_statistic_equals_its_formula_and_lies_between_one_and_the_width(
    statistic: Callable, formula: Callable[[np.ndarray], float], values: list[float]
) -> None:
    eigenvalues = descending(values)
    got = float(statistic(eigenvalues))
    assert got == pytest.approx(formula(eigenvalues.numpy()), rel=1e-9)
    assert 1 - 1e-9 <= got <= len(values) + 1e-9


@statistics
def test_a_statistic_of_many_spectra_is_that_of_each(statistic: Callable, formula: Callable[[np.ndarray], float]) -> None:
    spectra = torch.from_numpy(white(0, 3, 4, 9)).square().sort(-1, descending=True).values
    got = statistic(spectra)
    assert got.shape == (3, 4)
    assert got.flatten().tolist() == pytest.approx([formula(values) for values in spectra.flatten(0, 1).numpy()])


@statistics
@settings(repeatable, max_examples=30)
@given(st.data())
def test_scaling_does_not_change_a_statistic(statistic: Callable, formula: Callable, data: st.DataObject) -> None:
    eigenvalues = descending(data.draw(Spectra))
    scale = 2.0 ** data.draw(st.integers(-30, 30))
    assert float(statistic(scale * eigenvalues)) == pytest.approx(float(statistic(eigenvalues)), rel=1e-9)


@repeatable
@given(Spectra)
def test_the_effective_rank_of_eigenvalues_is_never_more_than_that_of_singular_values(values: list[float]) -> None:
    eigenvalues = descending(values)
    assert float(sp.effective_rank_eigen(eigenvalues)) <= float(sp.effective_rank(eigenvalues)) * (1 + 1e-12)


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize(("n", "width"), [(500, 24), (12, 24), (300, 280)], ids=["tall", "fewer rows than columns", "wide"])
def test_eigenvalues_are_squared_singular_values_over_n(dtype: type, n: int, width: int) -> None:
    x = (white(0, 1, n, width) @ rotation(1, width) * np.geomspace(1, 1e-2, width) + 3.0).astype(dtype)
    eigenvalues = sp.eigenvalues_of(moments_of(x, folds=1).total().covariance).numpy()
    singular = np.linalg.svd(x[0].astype(np.float64) - x[0].astype(np.float64).mean(0), compute_uv=False)
    expected = np.pad(singular**2 / n, (0, max(0, width - n)))
    assert np.abs(eigenvalues - expected).max() <= (1e-6 if dtype == np.float32 else 1e-12) * expected[0]
    assert (eigenvalues >= 0).all()
    assert (np.diff(eigenvalues) <= 0).all()


def test_an_eigenbasis_is_orthonormal_descending_and_gives_the_matrix_back() -> None:
    covariance = moments_of(white(0, 4, 50, 10)).total().covariance
    values, vectors = sp.eigenbasis_of(covariance)
    torch.testing.assert_close(vectors @ values.diag() @ vectors.T, covariance)
    torch.testing.assert_close(vectors.T @ vectors, torch.eye(10, dtype=torch.float64))
    torch.testing.assert_close(values, sp.eigenvalues_of(covariance))
    assert (values.diff() <= 0).all()


@pytest.mark.parametrize("rank", [1, 3, 10])
def test_equal_eigenvalues_are_counted_by_every_rank(rank: int) -> None:
    q = torch.from_numpy(rotation(rank, 24))
    eigenvalues = sp.eigenvalues_of(0.7 * q[:, :rank] @ q[:, :rank].T)
    for statistic in (sp.effective_rank_eigen, sp.participation_ratio, sp.stable_rank):
        assert float(statistic(eigenvalues)) == pytest.approx(rank, rel=1e-9)
    assert float(sp.effective_rank(eigenvalues)) == pytest.approx(rank, rel=1e-5)  # √ of rounding noise counts
    assert sp.energy_shares(eigenvalues)[:rank].tolist() == pytest.approx([(k + 1) / rank for k in range(rank)])
    assert math.isinf(sp.condition_number(eigenvalues))


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_data_in_a_subspace_have_at_most_its_rank(dtype: type) -> None:
    x = planted(0, 8, 100, 32, [9.0, 4.0, 1.0, 1.0, 0.5]).astype(dtype) + dtype(2)
    eigenvalues = sp.eigenvalues_of(moments_of(x).total().covariance)
    assert [int(sp.rank_at(eigenvalues, share)) for share in (0.90, 0.95, 0.99)] == [3, 4, 5]
    assert float(sp.energy_shares(eigenvalues)[4]) == pytest.approx(1, abs=1e-6)
    assert float(sp.effective_rank(eigenvalues)) <= 5
    # In float32, rounding of products may raise the other eigenvalues to about 1e-7 of the first.
    assert sp.condition_number(eigenvalues) > (1e3 if dtype is np.float32 else 1e300)


def test_rotating_the_data_changes_no_statistic_of_its_spectrum() -> None:
    x = white(0, 8, 60, 12) * np.geomspace(3, 0.2, 12)
    plain, turned = (sp.eigenvalues_of(moments_of(data).total().covariance) for data in (x, x @ rotation(5, 12)))
    for statistic, _ in FORMULAS.values():
        assert float(statistic(turned)) == pytest.approx(float(statistic(plain)), rel=1e-10)


@pytest.mark.parametrize("share", [0.5, 0.9, 0.95, 0.99])
def test_rounding_of_the_last_bit_adds_no_rank(share: float) -> None:
    for width in range(1, 201):
        expected = math.ceil(width * Fraction(str(share)))
        assert int(sp.rank_at(torch.full((width,), 0.1, dtype=torch.float64), share)) == expected


def test_energy_adds_up_shares_and_is_unknown_of_nothing() -> None:
    assert sp.energy_shares(descending([1, 4, 3, 2])).tolist() == pytest.approx([0.4, 0.7, 0.9, 1.0])
    assert sp.energy_shares(torch.zeros(3)).isnan().all()


@pytest.mark.parametrize(
    ("width", "points"), [(1, [1]), (2, [1, 2]), (3, [1, 2, 3]), (8, [1, 2, 4, 8]), (100, [1, 2, 4, 8, 16, 32, 64, 100])]
)
def test_energy_is_recorded_at_powers_of_two_and_at_the_width(width: int, points: list[int]) -> None:
    assert sp.energy_points(width) == points


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([9.0, 5.0, 4.0], 1.5),
        ([1.0, 1e-14], 1e7),
        ([1.0, 1e-16], math.inf),  # below the rounding of the first
        ([1.0, 0.0], math.inf),
        ([0.0, 0.0], math.inf),
    ],
)
def test_the_condition_number_is_that_of_singular_values_and_infinite_where_one_is_lost(
    values: list[float], expected: float
) -> None:
    assert sp.condition_number(torch.tensor(values, dtype=torch.float64)) == pytest.approx(expected)


def test_one_outlier_dimension_moves_the_spread_and_not_its_robust_twin() -> None:
    variances = torch.from_numpy(np.random.default_rng(0).uniform(1, 4, 100))
    outlier = variances.clone()
    outlier[17] = 1e6
    deviations = variances.sqrt().numpy()
    assert float(sp.spread(variances)) == pytest.approx(deviations.max() / deviations.min())
    low, high = np.percentile(deviations, [5, 95])
    assert float(sp.spread_p95_p5(variances)) == pytest.approx(high / low)
    assert float(sp.spread(outlier)) > 400 * float(sp.spread(variances))
    assert float(sp.spread_p95_p5(outlier)) == pytest.approx(float(sp.spread_p95_p5(variances)), rel=0.02)


@pytest.mark.parametrize("count", [5, 4096, 9000])
def test_variances_and_mean_squares_are_those_of_numpy_and_a_constant_has_none(count: int) -> None:
    x = np.random.default_rng(0).normal(size=(count, 4)).astype(np.float32) * np.array([1, 1e-4, 30, 0], np.float32)
    x += np.array([1000, 0.1, -3, 0.7], np.float32)
    variances, squares = (m.numpy() for m in sp.variances_and_mean_squares(torch.from_numpy(x).split(4096)))
    np.testing.assert_allclose(variances[:3], x[:, :3].astype(np.float64).var(0), rtol=1e-4)
    np.testing.assert_allclose(squares, (x.astype(np.float64) ** 2).mean(0), rtol=1e-6)
    assert variances[3] == 0 and squares[3] == np.float64(np.float32(0.7)) ** 2


@pytest.mark.parametrize("still", [1, 20], ids=["one", "all"])
def test_spread_is_infinite_where_a_dimension_never_varies(still: int) -> None:
    variances = torch.ones(20, dtype=torch.float64)
    variances[:still] = 0
    assert math.isinf(float(sp.spread(variances)))
    assert float(sp.spread_p95_p5(variances)) == pytest.approx(math.inf if still == 20 else 1 / 0.95, rel=0.1)


def test_principal_cosines_tell_how_far_two_subspaces_agree() -> None:
    q = torch.from_numpy(rotation(0, 8))
    angle = 0.3
    tilted = q[:, :2].clone()
    tilted[:, 1] = math.cos(angle) * q[:, 1] + math.sin(angle) * q[:, 5]
    assert sp.principal_cosines(q[:, :2], tilted).tolist() == pytest.approx([1, math.cos(angle)])
    for seed in range(20):
        mixed = q[:, :3] @ torch.from_numpy(rotation(seed, 3))
        assert sp.principal_cosines(q[:, :3], mixed).tolist() == pytest.approx([1, 1, 1])
        assert float(sp.principal_cosines(q[:, :3], mixed).max()) <= 1  # rounding does not exceed 1
    assert sp.principal_cosines(q[:, :3], q[:, 3:6]).tolist() == pytest.approx([0, 0, 0], abs=1e-12)


def test_random_subspaces_of_a_share_of_the_dimensions_agree_by_that_share() -> None:
    one, other = (torch.from_numpy(rotation(seed, 240)[:, :60]) for seed in (0, 1))
    assert float(sp.principal_cosines(one, other).square().mean()) == pytest.approx(60 / 240, abs=0.02)
