"""Spectra of samples with fewer vectors than dimensions equal those of the full matrices."""

import numpy as np
import pytest
import torch

from eigencache.spectral.measure import Place, measure_both
from eigencache.spectral.moments import Moments
from eigencache.spectral.wide import Sample, SpannedMoments

PLACE = Place(None, None, "keys", "pre_rope", "all")
LENGTHS = (12, 5, 9, 14, 8, 7, 3, 6)


def planted(width: int, n: int = sum(LENGTHS)) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    scales = torch.linspace(1, 0.05, width)
    x = torch.randn(n, width, generator=generator) * scales + 2 * torch.randn(width, generator=generator)
    x[:, 3] = 0.5  # a dead dimension
    return x


def test_the_span_gives_the_eigenvalues_energies_and_norms_of_all_dimensions() -> None:
    x = planted(90)
    spanned = Sample(x, LENGTHS).moments()
    assert isinstance(spanned, SpannedMoments)
    whole = Moments(90, folds=2)
    for index, part in enumerate(x.unsqueeze(1).split(LENGTHS)):
        whole.update(part, fold=index * 2 // len(LENGTHS))
    for short, full in zip(*(measure_both(PLACE, m, distinct_contexts=10**6) for m in (spanned, whole)), strict=True):
        assert short.width == full.width == 90
        np.testing.assert_allclose(short.eigenvalues, full.eigenvalues, atol=1e-5 * full.eigenvalues[0])
        assert short.energy == pytest.approx(full.energy, abs=1e-5)
        assert short.mean_norm == pytest.approx(full.mean_norm, rel=1e-5)
        assert short.mean_share == pytest.approx(full.mean_share, rel=1e-5)
        assert (short.spread, short.spread_p95_p5) == pytest.approx((full.spread, full.spread_p95_p5), rel=1e-4)
        assert short.dead == full.dead == ([3] if short.centered else [])
        assert short.support == pytest.approx(full.support, rel=1e-4)
        assert short.refusals == full.refusals
        assert short.rank_90 is None
    centered = measure_both(PLACE, spanned, distinct_contexts=10**6)[0]
    expected = measure_both(PLACE, whole, distinct_contexts=10**6)[0]
    assert centered.held_out_energy == pytest.approx(expected.held_out_energy, abs=1e-4)


def test_eigenvalues_agree_with_a_float64_svd() -> None:
    x = planted(200)
    spectrum = measure_both(PLACE, Sample(x, LENGTHS).moments(), distinct_contexts=10**6)[0]
    centered = x.double().numpy() - x.double().numpy().mean(0)
    expected = np.linalg.svd(centered, compute_uv=False) ** 2 / len(x)
    np.testing.assert_allclose(spectrum.eigenvalues[: len(x)], expected, atol=1e-6 * expected[0])
    assert spectrum.eigenvalues[len(x) :] == [0] * (200 - len(x))


def test_no_held_out_energy_is_given_beyond_the_vectors_of_a_half() -> None:
    energy = measure_both(PLACE, Sample(planted(200), LENGTHS).moments(), distinct_contexts=10**6)[0].held_out_energy
    assert energy is not None
    smaller = min(sum(LENGTHS[:4]), sum(LENGTHS[4:]))
    assert max(k for k in energy if k < 200) < smaller
    assert energy[200] == pytest.approx(1)


def test_more_vectors_than_dimensions_have_ordinary_moments() -> None:
    moments = Sample(planted(20), LENGTHS).moments()
    assert not isinstance(moments, SpannedMoments)
    assert moments.width == 20
    assert moments.total().count == sum(LENGTHS)


def test_a_thinned_sample_is_spread_over_the_sequences() -> None:
    sample = Sample(planted(20), LENGTHS)
    assert sample.thinned(64) is sample
    thinned = sample.thinned(20)
    assert len(thinned.x) == sum(thinned.lengths) == 16
    torch.testing.assert_close(thinned.x, sample.x[::4])
