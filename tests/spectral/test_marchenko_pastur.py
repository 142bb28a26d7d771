"""The null is the spectrum of white noise, and only directions above its edge are counted."""

from __future__ import annotations

import numpy as np
import pytest

from eigencache.spectral import spectrum as sp
from simulated import autoregressive, measured, white

ASPECTS = [0.004, 0.05, 0.3, 1.0, 2.0, 8.0]
aspects = pytest.mark.parametrize("aspect", ASPECTS)


@aspects
def test_expected_eigenvalues_are_those_of_simulated_white_noise(aspect: float) -> None:
    width, variance = (400, 2.5) if aspect >= 0.3 else (200, 2.5)
    n = round(width / aspect)
    x = np.random.default_rng(0).standard_normal((n, width)) * np.sqrt(variance)
    gram = x @ x.T if n < width else x.T @ x
    simulated = np.zeros(width)
    simulated[: min(n, width)] = np.linalg.eigvalsh(gram)[::-1] / n
    edge, expected = sp.marchenko_pastur(variance, width / n, width)
    assert simulated[0] == pytest.approx(edge, rel=0.07)
    assert np.abs(simulated - expected).max() <= 0.04 * edge
    assert np.abs(simulated - expected).mean() <= 0.02 * variance


@aspects
@pytest.mark.parametrize("variance", [0.01, 3.0])
def test_edge_mean_second_moment_and_share_of_zeros_are_those_of_the_law(aspect: float, variance: float) -> None:
    edge, values = sp.marchenko_pastur(variance, aspect, 4000)
    assert edge == pytest.approx(variance * (1 + aspect**0.5) ** 2)
    assert values.mean() == pytest.approx(variance, rel=1e-4)
    assert (values**2).mean() == pytest.approx(variance**2 * (1 + aspect), rel=1e-3)
    assert (values == 0).mean() == pytest.approx(max(0, 1 - 1 / aspect), abs=1e-3)
    assert values[0] <= edge
    assert (np.diff(values) <= 0).all()
    assert values[values > 0].min() >= variance * (1 - aspect**0.5) ** 2


@pytest.mark.parametrize(
    ("sequences", "length", "width"), [(64, 64, 16), (64, 16, 64), (32, 8, 200), (16, 8, 300)], ids="p/n = {}".format
)
def test_white_noise_has_nothing_above_its_null(sequences: int, length: int, width: int) -> None:
    found = [measured(white(seed, sequences, length, width)).above_null for seed in range(4)]
    assert sum(found) <= 0.01 * 4 * width


def test_noise_correlated_along_sequences_has_its_null_widened_and_nothing_above_it() -> None:
    for seed in range(4):
        spectrum = measured(autoregressive(seed, 128, 64, 32, 0.8))
        assert spectrum.null_edge == pytest.approx(
            np.mean(spectrum.eigenvalues) * (1 + (32 / spectrum.effective_vectors) ** 0.5) ** 2
        )
        assert spectrum.above_null <= 1


@pytest.mark.parametrize(("sequences", "length", "width"), [(64, 64, 64), (64, 16, 256)])
@pytest.mark.parametrize(("over", "found"), [(0.5, 0), (3.0, 1)], ids=["half of", "three times"])
def test_a_spike_is_counted_above_the_threshold_and_not_below_it(
    sequences: int, length: int, width: int, over: float, found: int
) -> None:
    threshold = (width / (sequences * length)) ** 0.5  # Baik, Ben Arous & Péché: the excess variance that is detectable
    scale = np.where(np.arange(width) == 3, np.sqrt(1 + over * threshold), 1)
    counts = [measured(white(seed, sequences, length, width) * scale).above_null for seed in range(8)]
    assert np.median(counts) == found
    assert abs(sum(counts) - 8 * found) <= 1  # the edge is asymptotic: about one spectrum of noise in ten exceeds it


def test_the_null_of_a_wide_spectrum_is_thinned_out_and_keeps_its_total() -> None:
    spectrum = measured(white(0, 16, 40, 300))
    assert len(spectrum.null_eigenvalues) == 256
    assert np.mean(spectrum.null_eigenvalues) == pytest.approx(np.mean(spectrum.eigenvalues), rel=1e-3)
