"""A spectrum has every statistic that the sample supports, and names the withheld ones in sentences."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from eigencache.spectral.measure import measure, measure_both
from eigencache.spectral.moments import Moments
from eigencache.spectral.rope import PAIRINGS, Pairing, Rotation, rotate
from simulated import MANY, PLACE, measured, moments_of, planted, white

RANKS = (
    "rank_90",
    "rank_95",
    "effective_rank",
    "effective_rank_eigen",
    "participation_ratio",
    "stable_rank",
    "split_half",
)
TAIL = ("rank_99", "condition_number")
WIDTH = 4


@pytest.mark.parametrize(
    ("contexts", "ranks", "tail", "refused", "warned"),
    [
        (WIDTH - 1, False, False, "ranks refused: only 3 distinct contexts for 4 dimensions", None),
        (WIDTH, True, False, "rank at 99 % and condition number refused", "ranks doubtful: 4 distinct"),
        (10 * WIDTH - 1, True, False, "rank at 99 % and condition number refused", "ranks doubtful: 39 distinct"),
        (10 * WIDTH, True, True, None, "tail doubtful: 40 distinct"),
        (50 * WIDTH - 1, True, True, None, "tail doubtful: 199 distinct"),
        (50 * WIDTH, True, True, None, None),
    ],
)
def test_support_decides_what_is_given_doubted_and_refused(
    contexts: int, ranks: bool, tail: bool, refused: str | None, warned: str | None
) -> None:
    spectrum = measured(white(0, 64, 64, WIDTH), distinct_contexts=contexts)
    assert spectrum.support == contexts / WIDTH
    assert {getattr(spectrum, name) is not None for name in RANKS} == {ranks}
    assert {getattr(spectrum, name) is not None for name in TAIL} == {tail}
    assert bool(spectrum.intervals) == ranks
    for said, expected in ((spectrum.refusals, refused), (spectrum.warnings, warned)):
        assert len(said) == (expected is not None)
        assert all(line.startswith(expected or "") for line in said)
    assert len(spectrum.eigenvalues) == WIDTH  # eigenvalues are never withheld
    assert spectrum.energy[WIDTH] == pytest.approx(1)
    assert spectrum.held_out_energy


@pytest.mark.parametrize(("contexts", "named"), [(150, "150 distinct contexts"), (MANY, "31 effective vectors")])
def test_the_scarcer_of_vectors_and_contexts_is_named(contexts: int, named: str) -> None:
    still = np.repeat(white(0, 32, 1, WIDTH), 10, axis=1)  # 31 effective vectors
    spectrum = measured(still if contexts == MANY else white(0, 64, 64, WIDTH), distinct_contexts=contexts)
    assert spectrum.support == pytest.approx(min(contexts, 31 if contexts == MANY else contexts) / WIDTH)
    assert named in " ".join(spectrum.refusals + spectrum.warnings)


def half_covariances(data: np.ndarray, folds: int) -> list[np.ndarray]:
    """Return the covariances of the vectors in even and in odd folds, computed by NumPy."""
    parts = np.array_split(data, folds)
    halves = (np.concatenate([part.reshape(-1, data.shape[-1]) for part in parts[first::2]]) for first in (0, 1))
    return [np.cov(half.T, bias=True) for half in halves]


def descending_basis(matrix: np.ndarray) -> np.ndarray:
    return np.linalg.eigh(matrix)[1][:, ::-1]


@pytest.mark.parametrize(("width", "tolerance"), [(24, 1e-9), (520, 1e-4)], ids=["float64", "wide: bases in float32"])
def test_held_out_energy_and_agreement_of_halves_are_those_of_numpy(width: int, tolerance: float) -> None:
    data = white(3, 16, 60, width) * np.geomspace(2, 0.1, width) + 1.0
    spectrum = measured(data, folds=6)
    halves = half_covariances(data, 6)
    bases = [descending_basis(half) for half in halves]
    for k, energy in spectrum.held_out_energy.items():
        crossed = zip(halves, [basis[:, :k] for basis in reversed(bases)], strict=True)
        expected = np.mean([np.trace(basis.T @ half @ basis) / np.trace(half) for half, basis in crossed])
        assert energy == pytest.approx(expected, rel=tolerance)
    if spectrum.rank_90:
        r = spectrum.rank_90
        expected = np.linalg.norm(bases[0][:, :r].T @ bases[1][:, :r]) ** 2 / r
        assert spectrum.split_half == pytest.approx(expected, rel=10 * tolerance)


def test_in_sample_energy_flatters_noise() -> None:
    spectrum = measured(white(0, 16, 20, 64))
    assert all(spectrum.held_out_energy[k] <= energy + 1e-12 for k, energy in spectrum.energy.items())
    assert spectrum.energy[16] > 1.3 * spectrum.held_out_energy[16]
    assert spectrum.held_out_energy[16] == pytest.approx(16 / 64, abs=0.04)  # the truth


def test_held_out_energy_of_a_planted_subspace_is_that_in_sample() -> None:
    spectrum = measured(planted(0, 64, 100, 32, [64.0, 16.0, 4.0, 1.0]))
    for k, energy in spectrum.energy.items():
        assert spectrum.held_out_energy[k] == pytest.approx(energy, abs=1e-3 if k < 4 else 1e-9)


def test_halves_agree_on_planted_directions_and_by_chance_alone_on_noise() -> None:
    assert measured(planted(0, 64, 100, 32, [64.0, 32.0, 16.0, 8.0])).split_half > 0.999
    noise = measured(white(0, 64, 60, 40))
    assert noise.rank_90 < 38
    assert noise.split_half == pytest.approx(noise.rank_90 / 40, abs=0.04)


def test_vectors_mean_and_raw_spread_are_those_of_numpy() -> None:
    data = white(0, 16, 40, 6) * np.array([1, 2, 3, 1, 1, 5]) + np.array([0, 0, 7, 0, 1, 0])
    flat = data.reshape(-1, 6)
    for centered, deviations in ((True, flat.std(0)), (False, np.sqrt((flat**2).mean(0)))):
        spectrum = measured(data, centered=centered)
        assert spectrum.vectors == len(flat)
        assert spectrum.mean_norm == pytest.approx(np.linalg.norm(flat.mean(0)))
        assert spectrum.mean_share == pytest.approx((flat.mean(0) ** 2).sum() / (flat**2).sum(1).mean())
        assert spectrum.spread == pytest.approx(deviations.max() / deviations.min())
        assert spectrum.spread_p95_p5 == pytest.approx(np.divide(*np.percentile(deviations, [95, 5])))
        assert sum(spectrum.eigenvalues) == pytest.approx((deviations**2).sum())


def test_an_uncentered_spectrum_has_the_mean_as_a_direction_and_no_null_halves_or_intervals() -> None:
    data = white(0, 16, 40, 6) + 100
    centered, uncentered = (measured(data, centered=choice) for choice in (True, False))
    assert (centered.rank_90, uncentered.rank_90) == (6, 1)
    assert uncentered.effective_vectors == centered.effective_vectors
    for field in ("held_out_energy", "split_half", "null_edge", "null_eigenvalues", "above_null"):
        assert getattr(centered, field) is not None
        assert getattr(uncentered, field) is None
    assert centered.intervals
    assert not uncentered.intervals


def test_measuring_both_centerings_at_once_gives_the_same_two_spectra() -> None:
    moments = moments_of(white(0, 16, 40, 6) * np.geomspace(3, 0.1, 6) + 2)
    options = {"distinct_contexts": 500, "at_most": 300.0, "seed": 4}
    assert measure_both(PLACE, moments, **options) == tuple(
        measure(PLACE, moments, centered=centered, **options) for centered in (True, False)
    )


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_condition_number_of_data_in_a_subspace_is_infinite_in_either_precision(dtype: type) -> None:
    for seed in range(8):
        assert math.isinf(measured(planted(seed, 16, 100, 6, [4.0, 2.0, 1.0]).astype(dtype)).condition_number)
    full = white(0, 64, 100, 6) * np.array([100, 1, 1, 1, 1, 0.1])
    assert measured(full.astype(dtype)).condition_number == pytest.approx(1000, rel=0.1)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("value", "centered"), [(0.1, True), (0.0, True), (0.0, False)])
def test_constant_vectors_are_refused_and_nothing_is_nan(dtype: type, value: float, centered: bool) -> None:
    data = (value * np.ones((9, 11, 3)) * np.array([1, -3, 7])).astype(dtype)
    spectrum = measured(data, centered=centered)
    assert spectrum.refusals[-1] == "every vector is the same: there is no spectrum"
    assert spectrum.energy == {}
    assert all(getattr(spectrum, name) is None for name in (*RANKS, *TAIL, "effective_vectors", "held_out_energy"))
    numbers = [number for _, number in spectrum if isinstance(number, float)]
    assert not any(map(math.isnan, [*numbers, *spectrum.eigenvalues]))
    assert spectrum.spread is spectrum.spread_p95_p5 is None
    assert spectrum.dead == [0, 1, 2]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("value", [0.0, 0.7, -300.0])
def test_a_dimension_that_never_varies_is_named_and_left_out_of_the_spreads(dtype: type, value: float) -> None:
    data = (white(0, 16, 40, 8) * np.geomspace(1e-3, 2, 8) + np.arange(8)).astype(dtype)
    data[..., [1, 6]] = value
    flat = data.reshape(-1, 8).astype(np.float64)
    for centered, dead in ((True, [1, 6]), (False, [] if value else [1, 6])):
        spectrum = measured(data, centered=centered)
        live = [i for i in range(8) if i not in dead]
        deviations = flat.std(0)[live] if centered else np.sqrt((flat**2).mean(0))[live]
        assert spectrum.dead == dead
        assert spectrum.spread == pytest.approx(deviations.max() / deviations.min(), rel=1e-5)
        assert spectrum.spread_p95_p5 == pytest.approx(np.divide(*np.percentile(deviations, [95, 5])), rel=1e-5)


@pytest.mark.parametrize(("share", "dead"), [(0.9, [2]), (1.1, [])])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_dimension_is_dead_up_to_the_rounding_of_the_largest_one(dtype: type, share: float, dead: list[int]) -> None:
    data = white(0, 16, 40, 4)
    data -= data.mean((0, 1))
    data /= data.std((0, 1))
    data[..., 0] = data[..., 0] * 3 + 4  # root mean square 5
    data[..., 2] *= share * 5 * np.finfo(dtype).eps
    assert measured(data.astype(dtype)).dead == dead


@pytest.mark.parametrize("pairing", PAIRINGS)
def test_after_rotation_a_dimension_is_dead_where_its_whole_pair_is_zero(pairing: Pairing) -> None:
    rotation = Rotation(100.0 ** -(torch.arange(3, dtype=torch.float64) / 3), 1.0, pairing)
    x = torch.from_numpy(white(0, 16, 40, 8)).float()[:, None]
    first, second = (1, 4) if pairing == "half" else (2, 3)  # the second pair of 6 rotated dimensions
    x[..., [first, second, 0]] = 0  # and half of the first pair
    x[..., 7] = 2.5  # not rotated
    turned = rotate(x, rotation.angles(torch.arange(40)), pairing)[:, 0].numpy()
    places = {"half": [1, 4], "interleaved": [2, 3], "split": [1, 4]}[pairing]
    assert measured(x[:, 0].numpy()).dead == sorted([0, first, second, 7])
    assert measured(turned).dead == [*places, 7]
    assert measured(turned, centered=False).dead == places


@pytest.mark.parametrize("sequences", [1, 2])
def test_halves_need_two_folds_that_hold_something(sequences: int) -> None:
    moments = moments_of(white(0, sequences, 500, 3), folds=4)
    spectrum = measure(PLACE, moments, centered=True, distinct_contexts=MANY)
    assert (spectrum.held_out_energy is not None) == (sequences == 2)
    assert (spectrum.split_half is not None) == (sequences == 2)


@pytest.mark.parametrize("filled", [(0, 2), (1, 3), (0, 1)], ids=str)
def test_halves_are_made_of_the_folds_that_hold_something(filled: tuple[int, int]) -> None:
    data = white(0, 2, 500, 3)
    moments = Moments(3, folds=4)
    for fold, sequence in zip(filled, data, strict=True):
        moments.update(torch.from_numpy(sequence).unsqueeze(1), fold=fold)
    spectrum = measure(PLACE, moments, centered=True, distinct_contexts=MANY)
    assert spectrum.held_out_energy == pytest.approx(measured(data, folds=2).held_out_energy)


def test_a_half_that_never_varies_has_no_held_out_energy() -> None:
    data = white(0, 16, 50, 3)
    data[:8] = 1.5
    spectrum = measured(data, folds=2)
    assert spectrum.held_out_energy is None
    assert spectrum.split_half is None
