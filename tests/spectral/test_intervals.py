"""95 % intervals by a bootstrap over groups of sequences: their coverage, their width and their limits."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch

from eigencache.records.probe import Spectrum
from eigencache.spectral import spectrum as sp
from eigencache.spectral.measure import REPLICATES, measure
from simulated import MANY, PLACE, autoregressive, measured, moments_of, white

pytestmark = pytest.mark.slow

POPULATIONS = {
    "decay": np.exp(-np.arange(16) / 4.0),
    "power law of 32": 1 / np.arange(1, 33.0),
    "power law of 64": 1 / np.arange(1, 65.0),
}
STATISTICS = {
    "effective_rank": sp.effective_rank,
    "effective_rank_eigen": sp.effective_rank_eigen,
    "participation_ratio": sp.participation_ratio,
    "stable_rank": sp.stable_rank,
}


@functools.cache
def simulated(name: str, rho: float, folds: int, count: int, sequences: int = 64) -> list[Spectrum]:
    """Return the spectra of `count` samples of one population, correlated along sequences of 64 vectors."""
    deviations = np.sqrt(POPULATIONS[name])
    data = (autoregressive(seed, sequences, 64, len(deviations), rho) * deviations for seed in range(count))
    return [measured(one, folds=folds) for one in data]


def population(name: str) -> dict[str, float]:
    """Return the limit of the statistics for infinitely many vectors."""
    values = torch.from_numpy(POPULATIONS[name])
    energy = {f"energy@{k}": float(sp.energy_shares(values)[k - 1]) for k in sp.energy_points(len(values))[:-1]}
    return {name: float(statistic(values)) for name, statistic in STATISTICS.items()} | energy


def estimate(spectrum: Spectrum, name: str) -> float:
    return spectrum.energy[int(name.removeprefix("energy@"))] if "@" in name else getattr(spectrum, name)


@pytest.mark.parametrize(
    ("name", "rho", "folds", "support"),
    [
        ("decay", 0.0, 16, 250),
        ("decay", 0.0, 8, 250),
        ("decay", 0.7, 16, 48),
        ("power law of 32", 0.3, 16, 70),
        ("power law of 64", 0.8, 16, 7.5),
    ],
)
def test_intervals_cover_the_truth(name: str, rho: float, folds: int, support: float) -> None:
    spectra = simulated(name, rho, folds, 60)
    assert np.mean([spectrum.support for spectrum in spectra]) == pytest.approx(support, rel=0.05)
    for statistic, truth in population(name).items():
        covered = [low <= truth <= high for low, high in (spectrum.intervals[statistic] for spectrum in spectra)]
        assert np.mean(covered) >= 0.85, statistic


@pytest.mark.parametrize(("statistic", "sign"), [("effective_rank", -1), ("energy@32", 1), ("participation_ratio", 0)])
def test_intervals_are_as_wide_as_chance_and_the_bias_of_few_data_together(statistic: str, sign: int) -> None:
    spectra = simulated("power law of 64", 0.8, 16, 60)
    found = np.array([estimate(spectrum, statistic) for spectrum in spectra])
    chance, bias = 3.92 * found.std(), found.mean() - population("power law of 64")[statistic]
    assert sign * bias > 0.5 * chance if sign else abs(bias) < 0.2 * chance
    width = np.mean([np.diff(spectrum.intervals[statistic]) for spectrum in spectra])
    assert 0.75 < width / (chance + abs(bias)) < 1.5


def test_intervals_reach_further_to_the_side_of_the_bias() -> None:
    spectra = simulated("power law of 64", 0.8, 16, 60)
    estimates = np.array([[spectrum.effective_rank] for spectrum in spectra])
    ends = np.array([spectrum.intervals["effective_rank"] for spectrum in spectra])
    below, above = np.abs(ends - estimates).mean(0)
    assert above > 2 * below


def test_a_resample_is_the_groups_drawn_and_its_variances_are_about_its_own_mean() -> None:
    data = white(0, 16, 30, 4) * np.array([2, 1, 1, 0.5]) + 3 * white(1, 16, 1, 4)  # the means of groups differ
    groups = data.reshape(8, 60, 4)
    basis = np.linalg.eigh(np.cov(data.reshape(-1, 4).T))[1]

    def stable_rank(vectors: np.ndarray, basis: np.ndarray) -> float:
        variances = (vectors.reshape(-1, 4) @ basis).var(0)
        return variances.sum() / variances.max()

    draws = np.random.default_rng(0).multinomial(8, [1 / 8] * 8, REPLICATES)
    low, high = np.quantile([stable_rank(np.repeat(groups, draw, axis=0), basis) for draw in draws], [0.025, 0.975])
    halves = (groups[first::2] for first in (0, 1))
    halved = np.mean([stable_rank(half, np.linalg.eigh(np.cov(half.reshape(-1, 4).T))[1]) for half in halves])
    bias = halved - stable_rank(groups, basis)
    expected = min(low, low - bias), max(high, high - bias)
    assert measured(data, folds=8).intervals["stable_rank"] == pytest.approx(expected, rel=1e-9)


def test_widths_shrink_with_the_root_of_the_number_of_sequences() -> None:
    few, many = (simulated("decay", 0.5, 16, 10, sequences) for sequences in (32, 128))
    for statistic in population("decay"):
        widths = [np.mean([np.diff(spectrum.intervals[statistic]) for spectrum in spectra]) for spectra in (few, many)]
        assert widths[0] / widths[1] == pytest.approx(2, rel=0.25), statistic


def test_an_interval_holds_its_estimate_and_every_recorded_statistic_has_one() -> None:
    spectrum = measured(white(0, 64, 64, 16) * np.sqrt(POPULATIONS["decay"]), folds=16)
    points = [f"energy@{k}" for k in spectrum.energy]
    assert set(spectrum.intervals) == {*STATISTICS, "rank_90", "rank_95", "spread", *points}
    for name, (low, high) in spectrum.intervals.items():
        assert low - 1e-9 <= estimate(spectrum, name) <= high + 1e-9, name


@pytest.mark.parametrize(("folds", "known"), [(7, False), (8, True)])
def test_fewer_than_eight_groups_give_no_interval(folds: int, known: bool) -> None:
    assert bool(measured(white(0, 64, 20, 4), folds=folds).intervals) == known


def test_empty_groups_are_not_resampled() -> None:
    data = white(0, 8, 100, 4)
    assert measured(data, folds=16).intervals == measured(data, folds=8).intervals
    assert not measured(data[:7], folds=16).intervals


def test_the_same_seed_gives_the_same_intervals_and_another_seed_others() -> None:
    moments = moments_of(white(0, 32, 50, 6))
    first, again, other = (
        measure(PLACE, moments, centered=True, distinct_contexts=MANY, seed=seed).intervals for seed in (1, 1, 2)
    )
    assert first == again
    assert first != other


def test_a_statistic_that_is_infinite_in_a_resample_has_no_interval() -> None:
    data = white(0, 32, 50, 4)
    data[4:, :, 2] = 3.0  # varies in the first of eight folds alone, which some resamples lack
    spectrum = measured(data)
    assert spectrum.dead == []
    assert "spread" not in spectrum.intervals
    assert "effective_rank" in spectrum.intervals


def test_the_interval_of_the_spread_is_that_of_the_dimensions_that_vary() -> None:
    data = white(0, 32, 50, 5) * np.array([1, 2, 3, 4, 5])
    dead = data.copy()
    dead[..., 2] = 3.0
    assert measured(dead).intervals["spread"] == pytest.approx(measured(data[..., [0, 1, 3, 4]]).intervals["spread"])
