"""n_eff is the number of independent vectors with the same information: at most n, and None where it cannot be estimated."""

from __future__ import annotations

import numpy as np
import pytest

from simulated import autoregressive, measured, planted, rotation, white


@pytest.mark.parametrize("rho", [0.3, 0.6, 0.9])
@pytest.mark.parametrize(("sequences", "length", "width"), [(200, 128, 8), (128, 256, 16)])
def test_autocorrelation_is_discounted(rho: float, sequences: int, length: int, width: int) -> None:
    x = autoregressive(0, sequences, length, width, rho) * np.geomspace(1, 0.3, width) @ rotation(0, width)
    expected = sequences * length * (1 - rho) / (1 + rho)
    assert measured(x).effective_vectors == pytest.approx(expected, rel=0.2)


def test_independent_vectors_all_count_and_none_counts_twice() -> None:
    shares = [measured(white(seed, 128, 64, 8)).effective_vectors / (128 * 64) for seed in range(6)]
    assert max(shares) <= 1
    assert min(shares) >= 0.85


@pytest.mark.parametrize("sequences", [8, 32, 128])
def test_a_sequence_that_never_changes_is_one_vector(sequences: int) -> None:
    x = np.repeat(white(0, sequences, 1, 6), 40, axis=1)
    assert measured(x).effective_vectors == pytest.approx(sequences - 1)  # minus one for the common mean


def test_the_leading_directions_decide() -> None:
    still, noisy = np.repeat(white(0, 64, 1, 4), 50, axis=1), white(1, 64, 50, 4)
    lead_still = measured(np.concatenate([5 * still, 0.1 * noisy], -1)).effective_vectors
    lead_noisy = measured(np.concatenate([0.1 * still, 5 * noisy], -1)).effective_vectors
    assert lead_still < 70
    assert lead_noisy > 0.8 * 64 * 50


def test_repeated_text_counts_as_new_unless_its_contexts_are_counted() -> None:
    x = np.tile(planted(0, 1, 40, 4, [4.0, 2.0, 1.0, 1.0]), (64, 1, 1))
    assert measured(x).effective_vectors == 64 * 40  # sequences of equal means show no correlation
    assert measured(x, distinct_contexts=40).support == 40 / 4


@pytest.mark.parametrize(("sequences", "known"), [(7, False), (8, True)])
def test_fewer_than_eight_sequences_cannot_tell(sequences: int, known: bool) -> None:
    spectrum = measured(white(0, sequences, 100, 4), folds=4)
    assert (spectrum.effective_vectors is not None) == known
    assert (spectrum.null_edge is not None) == known
    assert (spectrum.above_null is not None) == known


@pytest.mark.parametrize(("at_most", "expected"), [(50.0, 50.0), (1e9, None)])
def test_a_bound_from_elsewhere_is_kept(at_most: float, expected: float | None) -> None:
    x = autoregressive(0, 64, 64, 4, 0.5)
    spectrum = measured(x, at_most=at_most)
    assert spectrum.effective_vectors == (expected or measured(x).effective_vectors)
    assert spectrum.support == spectrum.effective_vectors / 4
