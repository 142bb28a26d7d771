"""The transform in a metric loses exactly the eigenvalues that it drops, compared with NumPy and planted directions."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eigencache.errors import StatisticsError
from eigencache.spectral.metric import regularized
from eigencache.spectral.moments import SecondOrder
from eigencache.spectral.transform import fit_transform, random_transform


def sample(count: int, width: int, seed: int) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.normal(size=(count, width)) @ rng.normal(size=(width, width)) + rng.normal(size=width) * 3)


def moments_of(x: torch.Tensor) -> SecondOrder:
    mean = x.mean(0)
    return SecondOrder(len(x), mean, (x - mean).mT @ (x - mean))


def positive(width: int, seed: int) -> torch.Tensor:
    return regularized(moments_of(sample(4 * width, width, seed)).covariance)


@settings(max_examples=25, deadline=None)
@given(width=st.integers(2, 12), seed=st.integers(0, 10_000), centered=st.booleans(), data=st.data())
def test_truncation_loses_exactly_the_dropped_eigenvalues_of_the_cost(width, seed, centered, data) -> None:
    rank = data.draw(st.integers(1, width))
    x, metric = sample(5 * width, width, seed), positive(width, seed + 1)
    full = fit_transform(moments_of(x), metric=metric, centered=centered)
    codec = full.truncated(rank)
    error = x - codec.decode(codec.encode(x))
    cost = float(((error @ metric) * error).sum(1).mean())
    assert cost == pytest.approx(float(full.spectrum[rank:].sum()), rel=1e-6, abs=1e-8 * float(full.spectrum.sum()))


@settings(max_examples=25, deadline=None)
@given(width=st.integers(2, 10), seed=st.integers(0, 10_000))
def test_no_other_basis_of_the_same_rank_costs_less(width, seed) -> None:
    x, metric = sample(5 * width, width, seed), positive(width, seed + 1)
    moments, rank = moments_of(x), max(1, width // 2)

    def cost(transform) -> float:
        error = x - transform.decode(transform.encode(x))
        return float(((error @ metric) * error).sum(1).mean())

    best = cost(fit_transform(moments, metric=metric).truncated(rank))
    assert best <= cost(fit_transform(moments).truncated(rank)) * (1 + 1e-9)
    assert best <= cost(random_transform(moments, seed).truncated(rank)) * (1 + 1e-9)


def test_without_a_metric_it_is_the_pca_of_numpy() -> None:
    x = sample(300, 8, 0)
    fitted = fit_transform(moments_of(x))
    _, singular, rows = np.linalg.svd((x - x.mean(0)).numpy(), full_matrices=False)
    np.testing.assert_allclose(fitted.spectrum.numpy(), singular**2 / len(x), rtol=1e-9)
    np.testing.assert_allclose(np.abs(fitted.encoder.numpy().T), np.abs(rows), atol=1e-8)


def test_planted_directions_need_no_more_than_their_number() -> None:
    rng = np.random.default_rng(0)
    x = torch.from_numpy(rng.normal(size=(400, 3)) @ rng.normal(size=(3, 16)) + 5)
    transform = fit_transform(moments_of(x)).truncated(3)
    torch.testing.assert_close(transform.decode(transform.encode(x)), x)


def test_a_metric_that_weighs_one_direction_keeps_that_direction() -> None:
    x = sample(500, 6, 3)
    weights = torch.full((6,), 1e-9, dtype=torch.float64)
    weights[4] = 1.0
    transform = fit_transform(moments_of(x), metric=torch.diag(weights)).truncated(1)
    error = x - transform.decode(transform.encode(x))
    assert float(error[:, 4].abs().max()) < 1e-3 * float(x[:, 4].std())


@pytest.mark.parametrize("rank", [0, 7])
def test_a_rank_that_does_not_exist_is_refused(rank: int) -> None:
    with pytest.raises(StatisticsError, match=f"rank {rank} is out of range: this transform has ranks 1 to 6"):
        fit_transform(moments_of(sample(50, 6, 0))).truncated(rank)


def test_fewer_vectors_than_dimensions_are_refused() -> None:
    with pytest.raises(StatisticsError, match="4 vectors are too few for a basis of 6 dimensions"):
        fit_transform(moments_of(sample(4, 6, 0)))
    broken = SecondOrder(100, torch.zeros(2).double(), torch.full((2, 2), torch.nan).double())
    with pytest.raises(StatisticsError, match="NaN"):
        fit_transform(broken)


def test_its_bytes_are_those_of_its_tensors() -> None:
    transform = fit_transform(moments_of(sample(50, 6, 0))).to(torch.float32).truncated(2)
    assert transform.nbytes == 4 * (6 + 6 * 2 + 2 * 6)


@pytest.mark.parametrize("centered", [True, False])
@pytest.mark.parametrize("weighed", [True, False])
def test_a_dead_dimension_takes_no_coefficient_and_is_decoded_exactly(weighed: bool, centered: bool) -> None:
    x = sample(400, 8, 0).float().double()
    x[:, [2, 5]] = torch.tensor([0.7, -3.0]).double() if centered else 0.0
    live = [0, 1, 3, 4, 6, 7]
    metric = positive(8, 1) if weighed else torch.eye(8, dtype=torch.float64)
    fitted = fit_transform(moments_of(x), metric=metric if weighed else None, centered=centered)
    center = x[:, live] - x[:, live].mean(0) if centered else x[:, live]
    root = np.linalg.cholesky(metric[live][:, live].numpy())
    spectrum = np.linalg.eigvalsh(root.T @ (center.mT @ center / len(x)).numpy() @ root)[::-1]
    assert (fitted.rank, fitted.width) == (6, 8)
    np.testing.assert_allclose(fitted.spectrum.numpy(), [*spectrum, 0, 0], rtol=1e-9, atol=1e-12)
    for codec in (fitted, fitted.truncated(2), fitted.to(torch.float32).truncated(3)):
        decoded = codec.decode(codec.encode(x))
        assert torch.equal(decoded[:, [2, 5]], x[:, [2, 5]].to(decoded.dtype))
        error = (x - decoded)[:, live].double()
        cost = float(((error @ metric[live][:, live]) * error).sum(1).mean())
        assert cost == pytest.approx(spectrum[codec.rank :].sum(), rel=1e-4, abs=1e-9)


def test_a_dead_dimension_takes_no_coefficient_of_a_random_basis_either() -> None:
    x = sample(50, 6, 0)
    x[:, 4] = 2.0
    drawn = random_transform(moments_of(x), 0)
    assert drawn.rank == 5
    decoded = drawn.decode(drawn.encode(x))
    torch.testing.assert_close(decoded, x)
    assert torch.equal(drawn.truncated(1).decode(drawn.truncated(1).encode(x))[:, 4], x[:, 4])


def test_vectors_that_never_vary_are_decoded_exactly_from_one_coefficient() -> None:
    x = torch.tensor([0.5, 0.0, -7.0], dtype=torch.float64).expand(20, 3)
    fitted = fit_transform(moments_of(x))
    assert fitted.rank == 1 and not fitted.spectrum.any()
    assert torch.equal(fitted.decode(fitted.encode(x)), x)
