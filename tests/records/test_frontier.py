"""Bits at equal loss: crossings of planted curves are exact, nothing is extrapolated, intervals cover what was planted."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eigencache.records.frontier import Curve, bits_at_loss, crossing, falling, missing

BITS = np.array([0.25, 0.5, 1.0, 2.0, 4.0])
values = st.lists(st.floats(-3, 3, allow_subnormal=False), min_size=1, max_size=7).map(np.array)


def planted(losses: np.ndarray, sequences: int = 24, bits: np.ndarray = BITS, noise: float = 0.0, seed: int = 0) -> Curve:
    """A curve whose ΔNLL is `losses`, sequences of unlike lengths and hardness, hard at all points alike."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(50, 150, sequences).astype(float)
    hardness = 1 + noise * rng.standard_normal(sequences)
    hardness *= tokens.sum() / (hardness * tokens).sum()
    return Curve(bits, losses[:, None] * (hardness * tokens), tokens)


# Crossings


@pytest.mark.parametrize("slope", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("loss", [0.02, 0.05, 0.1])
def test_a_power_law_is_crossed_where_it_says(slope: float, loss: float) -> None:
    at_one = 0.05
    losses = at_one * BITS**-slope
    expected = (at_one / loss) ** (1 / slope)
    if BITS[0] < expected < BITS[-1]:
        assert bits_at_loss(BITS, losses, loss) == pytest.approx(expected, rel=1e-12)
    else:
        assert bits_at_loss(BITS, losses, loss) is None


def test_the_order_of_the_points_is_of_no_matter() -> None:
    losses = 0.05 / BITS
    for order in itertools.permutations(range(4)):
        rows = list(order)
        assert bits_at_loss(BITS[rows], losses[rows], 0.06) == pytest.approx(0.05 / 0.06, rel=1e-12)


@pytest.mark.parametrize(("low", "share"), [(0.0, 1 / 2), (-0.02, 1 / 4), (-0.08, 1 / 10)])
def test_losses_are_interpolated_linearly_where_one_is_not_positive(low: float, share: float) -> None:
    assert bits_at_loss(np.array([1.0, 4.0]), np.array([0.02, low]), 0.01) == pytest.approx(4**share)


def test_a_point_on_the_loss_is_the_crossing() -> None:
    assert bits_at_loss(BITS, np.array([0.5, 0.1, 0.03, 0.01, 0.003]), 0.03) == pytest.approx(1.0)


def test_a_dent_is_levelled_before_it_is_crossed() -> None:
    """The lucky point alone would cross at 0.5 bits; with its neighbor it is as high as their mean."""
    losses = np.array([0.1, 0.01, 0.05, 0.02, 0.001])
    levelled = np.array([0.1, 0.03, 0.03, 0.02, 0.001])
    assert bits_at_loss(BITS, losses, 0.025) == bits_at_loss(BITS, levelled, 0.025)
    assert 1.0 < bits_at_loss(BITS, losses, 0.025) < 2.0  # type: ignore[operator]


@pytest.mark.parametrize(
    ("losses", "loss", "why"),
    [
        ([0.08, 0.04, 0.02, 0.01, 0.005], 0.1, "loses 0.0800 at its fewest, 0.25 bits"),
        ([0.08, 0.04, 0.02, 0.01, 0.005], 0.08, "loses 0.0800 at its fewest, 0.25 bits"),
        ([0.08, 0.04, 0.02, 0.01, 0.005], 0.003, "loses 0.0050 at its most, 4 bits"),
        ([-0.01, -0.02, -0.03, -0.04, -0.05], 0.003, "loses -0.0100 at its fewest, 0.25 bits"),
    ],
)
def test_nothing_is_extrapolated_and_the_nearest_end_says_why(losses: list[float], loss: float, why: str) -> None:
    curve = planted(np.array(losses))
    assert bits_at_loss(BITS, curve.losses(), loss) is None
    assert missing(curve, loss) == why


def test_a_measured_point_within_the_loss_counts_though_more_bits_lost_more() -> None:
    kvtc = np.array([0.1, 0.05, 0.03, 0.0099, 0.0230])  # KVTC on ref-deepseek, whose last point is noise
    assert 1.0 < bits_at_loss(BITS, kvtc, 0.01) <= 2.0  # type: ignore[operator]
    assert bits_at_loss(BITS, kvtc, 0.009) is None


@pytest.mark.parametrize(("loss", "word"), [(0.01, "most"), (0.1, "fewest")])
def test_a_single_point_has_no_crossing(loss: float, word: str) -> None:
    curve = planted(np.array([0.03]), bits=np.array([1.0]))
    assert bits_at_loss(curve.bits, curve.losses(), loss) is None
    assert word in missing(curve, loss)


# Falling


def brute_force(y: np.ndarray) -> np.ndarray:
    """Over all ways to cut y into runs, each held at its mean: the falling one nearest in squares."""
    best, least = y, np.inf
    for cuts in itertools.product((False, True), repeat=len(y) - 1):
        edges = [0, *(i + 1 for i, cut in enumerate(cuts) if cut), len(y)]
        found = np.concatenate([np.full(b - a, y[a:b].mean()) for a, b in itertools.pairwise(edges)])
        if (np.diff(found) <= 1e-12).all() and (distance := ((found - y) ** 2).sum()) < least - 1e-12:
            best, least = found, distance
    return best


@settings(max_examples=60, deadline=None)
@given(values)
def test_falling_is_the_nearest_falling_sequence(y: np.ndarray) -> None:
    found = falling(y)
    assert (np.diff(found) <= 0).all()
    assert found.mean() == pytest.approx(y.mean(), abs=1e-12)
    assert ((found - y) ** 2).sum() == pytest.approx(((brute_force(y) - y) ** 2).sum(), abs=1e-9)


@settings(max_examples=30, deadline=None)
@given(values)
def test_what_falls_already_stays(y: np.ndarray) -> None:
    fallen = np.sort(y)[::-1]
    assert np.array_equal(falling(fallen), fallen)
    assert np.array_equal(falling(falling(y)), falling(y))


# Several seeds


def test_a_loss_is_over_tokens_and_not_over_sequences() -> None:
    curve = Curve(np.array([1.0]), np.array([[3.0, 1.0]]), np.array([10.0, 30.0]))
    assert curve.losses().tolist() == [0.1]
    assert curve.losses(np.array([0, 0, 1])).tolist() == [pytest.approx(7 / 50)]


def test_seeds_are_averaged_geometrically() -> None:
    curves = [planted(0.05 * factor / BITS) for factor in (0.5, 2.0)]
    each, mean, _ = crossing(curves, 0.05)
    assert each == [pytest.approx(0.5), pytest.approx(2.0)]
    assert mean == pytest.approx(1.0)


def test_a_seed_without_a_crossing_leaves_none() -> None:
    each, mean, interval = crossing([planted(0.05 / BITS), planted(0.5 / BITS)], 0.05)
    assert each == [pytest.approx(1.0), None]
    assert (mean, interval) == (None, None)


def test_equal_sequences_and_seeds_have_an_interval_of_no_width() -> None:
    _, mean, interval = crossing([planted(0.05 / BITS)] * 3, 0.05)
    assert interval == (pytest.approx(mean), pytest.approx(mean))


def test_the_interval_covers_what_was_planted_about_as_often_as_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("eigencache.records.frontier.REPLICATES", 200)
    tokens = np.full(40, 100.0)
    covered = 0
    for seed in range(40):
        hardness = 1 + 0.4 * np.random.default_rng(seed).standard_normal(40)
        curve = Curve(BITS, (0.05 / BITS)[:, None] * hardness * tokens, tokens)
        _, _, interval = crossing([curve], 0.05, seed)
        assert interval is not None
        covered += interval[0] <= 1.0 <= interval[1]
    assert 32 <= covered <= 40  # 38 are expected; fewer than 32 are in less than one of a thousand


def test_seeds_that_differ_widen_the_interval() -> None:
    alike, unlike = ([planted(0.05 * f / BITS, noise=0.2) for f in factors] for factors in ((1, 1, 1), (0.7, 1, 1.4)))
    widths = [np.log(high / low) for _, _, (low, high) in (crossing(c, 0.05) for c in (alike, unlike))]  # type: ignore[misc]
    assert widths[1] > 2 * widths[0]


def test_the_same_seed_draws_the_same_interval() -> None:
    curve = planted(0.05 / BITS, noise=0.5)
    assert crossing([curve], 0.04, seed=3) == crossing([curve], 0.04, seed=3)
    assert crossing([curve], 0.04, seed=3)[2] != crossing([curve], 0.04, seed=4)[2]


def test_a_crossing_near_an_end_has_no_interval() -> None:
    """Half of the draws do not reach the loss at all."""
    curve = planted(0.05 / BITS, noise=0.5)
    _, mean, interval = crossing([curve], 0.05 / 4 * 1.001)
    assert mean == pytest.approx(4, rel=0.01)
    assert interval is None
