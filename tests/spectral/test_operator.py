"""The identity has energy r/p at rank r for any vectors; the gains of planted operators are recovered."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eigencache.spectral.moments import SecondOrder
from eigencache.spectral.operator import analyze, kept_shares, operator_transform
from eigencache.spectral.transform import Transform, fit_transform


def pca_of(covariance: np.ndarray) -> Transform:
    width = len(covariance)
    return fit_transform(SecondOrder(1000, torch.zeros(width, dtype=torch.float64), torch.from_numpy(covariance) * 1000))


def covariance(width: int, seed: int, decay: float = 0.7) -> np.ndarray:
    """Return a covariance with eigenvalues decay^i in random directions, so that few directions hold most variance."""
    basis = np.linalg.qr(np.random.default_rng(seed).normal(size=(width, width)))[0]
    return (basis * decay ** np.arange(width)) @ basis.T


def residual(width: int, rank: int, scale: float, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.eye(width) + scale * rng.normal(size=(width, rank)) @ rng.normal(size=(rank, width)) / width


@pytest.mark.parametrize("width", [7, 64])
def test_the_identity_has_energy_r_over_p_at_every_rank_whatever_the_vectors(width: int) -> None:
    pca = pca_of(covariance(width, 0))
    found = analyze(3, torch.eye(width, dtype=torch.float64), pca, pca, list(range(1, width + 1)))
    assert found.energy == pytest.approx({r: r / width for r in range(1, width + 1)}, rel=1e-12)
    assert (found.layer_idx, found.unit_gains, found.distance) == (3, width, 0)
    assert found.condition_number == pytest.approx(1)
    assert found.effective_rank == pytest.approx(width)
    shares = 0.7 ** np.arange(width)
    assert found.variance_energy[width // 2] == pytest.approx(shares[: width // 2].sum() / shares.sum())  # not r/p


@settings(max_examples=40, deadline=None)
@given(width=st.integers(3, 20), rank=st.integers(1, 8), scale=st.floats(0.01, 2), seed=st.integers(0, 10_000))
def test_energy_lies_between_the_bounds_of_the_distance_and_most_gains_are_1(width, rank, scale, seed) -> None:
    m = residual(width, rank, scale, seed)
    pca = pca_of(covariance(width, seed))
    found = analyze(0, torch.from_numpy(m), pca, pca, list(range(1, width + 1)))
    assert found.unit_gains >= width - 2 * rank  # MᵀM − I has at most rank 2k
    change = np.linalg.norm(m - np.eye(width), 2)
    if change < 1:  # every gain within 1 ± ε
        for r, energy in found.energy.items():
            high, low = r * (1 + change) ** 2, r * (1 - change) ** 2
            rest_low, rest_high = (width - r) * (1 - change) ** 2, (width - r) * (1 + change) ** 2
            assert low / (low + rest_high) - 1e-9 <= energy <= high / (high + rest_low) + 1e-9


def test_a_planted_direction_on_the_identity_is_told_apart() -> None:
    """M = I + 9 u uᵀ has one gain of 10 and p − 1 equal gains, among which a truncation has no preference."""
    width, u = 16, np.full(16, 0.25)
    m = np.eye(width) + 9 * np.outer(u, u)
    pca = pca_of(covariance(width, 1))
    found = analyze(0, torch.from_numpy(m), pca, pca, [4])
    assert found.singular_values == pytest.approx([10.0] + [1.0] * 15)
    assert found.unit_gains == 15
    assert found.condition_number == pytest.approx(10)
    assert found.energy[4] == pytest.approx(103 / 115)
    assert found.distance == pytest.approx(9 / 4)
    assert found.effective_rank == pytest.approx(np.exp(-(0.4 * np.log(0.4) + 15 * 0.04 * np.log(0.04))))


def test_a_singular_operator_has_an_infinite_condition_number() -> None:
    u = np.eye(8)[0]
    pca = pca_of(covariance(8, 1))
    assert analyze(0, torch.from_numpy(np.eye(8) - np.outer(u, u)), pca, pca, []).condition_number == float("inf")


@settings(max_examples=25, deadline=None)
@given(width=st.integers(2, 16), seed=st.integers(0, 10_000), data=st.data())
def test_its_transform_is_the_truncated_svd_of_m(width, seed, data) -> None:
    rank = data.draw(st.integers(1, width))
    m = residual(width, width, 1.5, seed)
    x = np.random.default_rng(seed).normal(size=(5, width))
    left, gains, right = np.linalg.svd(m)
    expected = x @ ((left[:, :rank] * gains[:rank]) @ right[:rank]).T
    short = operator_transform(torch.from_numpy(m)).truncated(rank)
    given_to_cache = torch.from_numpy(x @ m.T)
    np.testing.assert_allclose(short.decode(short.encode(given_to_cache)), expected, atol=1e-9)
    coefficients = np.abs(x @ right[:rank].T * gains[:rank])  # S_r V_rᵀ x, up to the signs of singular vectors
    np.testing.assert_allclose(short.encode(given_to_cache).abs(), coefficients, atol=1e-8)


def test_about_a_mean_the_mean_survives_truncation() -> None:
    mean = torch.arange(6, dtype=torch.float64)
    short = operator_transform(torch.from_numpy(residual(6, 2, 1.0, 0)), mean).truncated(1)
    torch.testing.assert_close(short.decode(short.encode(mean[None])), mean[None])


@settings(max_examples=25, deadline=None)
@given(width=st.integers(2, 16), seed=st.integers(0, 10_000))
def test_the_operators_directions_keep_what_numpy_says_and_never_more_than_pca(width, seed) -> None:
    c, m = covariance(width, seed), residual(width, 2, 1.0, seed)
    svd = operator_transform(torch.from_numpy(m))
    kept = kept_shares(svd, pca_of(c))
    expected = np.cumsum(np.diag(svd.encoder.numpy().T @ c @ svd.encoder.numpy())) / np.trace(c)
    np.testing.assert_allclose(kept, expected, atol=1e-9)
    assert np.all(kept.numpy() <= np.cumsum(0.7 ** np.arange(width)) / np.sum(0.7 ** np.arange(width)) + 1e-9)


def test_on_white_vectors_the_gains_are_the_variance_and_on_others_they_may_be_its_reverse() -> None:
    gains = np.linspace(2, 1, 12)
    svd = operator_transform(torch.from_numpy(np.diag(gains)))
    white, opposed = (pca_of(np.diag(gains**2 * variances)) for variances in (np.ones(12), gains**-4))
    np.testing.assert_allclose(kept_shares(svd, white), np.cumsum(gains**2) / np.sum(gains**2), atol=1e-9)
    np.testing.assert_allclose(kept_shares(svd, opposed), np.cumsum(gains**-2) / np.sum(gains**-2), atol=1e-9)
