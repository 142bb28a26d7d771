"""Which first positions codecs store exactly: four, and those that gradients single out, unless the settings say."""

import torch

from eigencache.calibration.calibration_set import CalibrationSet
from eigencache.calibration.gradient_energy import GradientEnergy
from eigencache.calibration.session import Session
from eigencache.calibration.vectors import SampledVectors
from eigencache.fitting.eigen import EigenSettings, fit_eigen, mean_of
from eigencache.fitting.live import LiveSettings, fit_live
from planted_eigen import LAYOUT, WIDTH, gaussian
from stub_codecs import random_sequences, tiny_loaded


def source_with(sinks: int) -> CalibrationSet:
    """A calibration set whose Fisher metric was measured with a large gradient at the first `sinks` positions."""
    source = CalibrationSet(Session(tiny_loaded("llama")), random_sequences(*(40,) * 24))
    source.metric("fisher")
    energy, gradient = GradientEnergy(), torch.ones(1, 2, 40, 16)
    gradient[:, :, :sinks] *= 30
    energy.add({0: (gradient, gradient)}, [40])
    source.gradients["fisher"] = energy
    return source


def test_codecs_store_the_first_tokens_exactly_that_gradients_single_out() -> None:
    for planted, expected in ((1, 4), (7, 7)):
        source = source_with(planted)
        fit, live = fit_eigen(source), fit_live(source)
        assert fit.sinks == fit.at_step(fit.spread).codec.kept.sinks == expected
        assert live.sinks == live.at_bits(3.0).sinks == expected
        assert len(fit.fitted.vectors.lengths) and set(fit.fitted.vectors.lengths) == {40 - expected}


def test_settings_decide_before_gradients_and_frobenius_stores_four() -> None:
    source = source_with(7)
    assert fit_eigen(source, EigenSettings(sinks=2)).sinks == 2
    assert fit_live(source, LiveSettings(sinks=0)).sinks == 0
    assert fit_eigen(source, EigenSettings(metric="frobenius")).sinks == 4


def test_random_models_store_four() -> None:
    source = CalibrationSet(Session(tiny_loaded("llama")), random_sequences(*(40,) * 24))
    assert source.sinks == fit_eigen(source).sinks == 4


def test_the_mean_is_that_of_all_but_the_sinks() -> None:
    lengths = (60, 3, 1, 40, 2)
    samples = SampledVectors(LAYOUT, gaussian(sum(lengths), 3) / 3, torch.zeros(106, dtype=torch.int64), lengths)
    samples.stored[samples.positions < 2] += 1000
    expected = torch.cat([x[2:] for x in samples.stored.split(list(lengths))]).double().mean(0)
    torch.testing.assert_close(mean_of(samples, 2), expected.float(), rtol=0, atol=1e-5)
    assert mean_of(samples, 2).shape == (WIDTH,)
