"""The dead-zone quantizer: its error, its rate against the bound, and what it refuses."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from eigencache.codec.eigen.quantizer import LAMBDA, DeadZone, fit_class
from eigencache.errors import CodecError


def quantizer(fit, count=1):
    return DeadZone(*(torch.full((count,), float(x)) for x in (fit.dead_zone, fit.offset, fit.first, fit.rest)))


def rate_and_distortion(y, fit):
    one = quantizer(fit)
    y = torch.from_numpy(y.astype(np.float32))[:, None]
    q = one.quantize(y)
    counts = torch.unique(q, return_counts=True)[1].double()
    share = counts / counts.sum()
    return float(-(share * share.log2()).sum()), float((one.dequantize(q) - y).square().mean())


@pytest.mark.parametrize("scale", [0.3, 0.7, 2.0, 20.0])
def test_at_its_slope_it_costs_no_more_than_rounding_with_ideal_codes(scale):
    rng = np.random.default_rng(0)
    y = rng.laplace(size=200_000) * scale
    fit = fit_class(np.abs(y[::2]))
    rate, distortion = rate_and_distortion(y[1::2], fit)
    plain = replace(fit, dead_zone=0.5, offset=0.0, first=0.0, rest=0.0)
    plain_rate, plain_distortion = rate_and_distortion(y[1::2], plain)
    assert distortion + LAMBDA * rate <= (plain_distortion + LAMBDA * plain_rate) * 1.0005
    if scale <= 0.7:
        assert distortion + LAMBDA * rate < 0.98 * (plain_distortion + LAMBDA * plain_rate)


def test_at_high_rate_a_gaussian_is_a_quarter_bit_from_the_bound():
    y = np.random.default_rng(1).normal(size=400_000) * 12
    rate, distortion = rate_and_distortion(y[::2], fit_class(np.abs(y[1::2])))
    assert rate - 0.5 * np.log2(144 / distortion) == pytest.approx(0.254, abs=0.01)


def test_centroids_are_the_means_of_their_bins():
    y = np.abs(np.random.default_rng(2).laplace(size=300_000))
    fit = fit_class(y)
    one = quantizer(fit)
    q = one.quantize(torch.from_numpy(y.astype(np.float32))[:, None])[:, 0].numpy()
    assert 1 - fit.first == pytest.approx(y[q == 1].mean(), abs=0.01)


@pytest.mark.parametrize("scale", [0.3, 0.6, 1.0, 5.0])
def test_the_gain_of_an_integer_is_what_it_saves_at_lambda_less_its_bits(scale):
    y = np.abs(np.random.default_rng(3).normal(size=90_000) * scale)
    fit = fit_class(y)
    one = quantizer(fit)
    q = one.quantize(torch.from_numpy(y.astype(np.float32))[:, None])
    saved = np.square(y).mean() - np.square(one.dequantize(q)[:, 0].numpy() - y).mean()
    share = torch.unique(q, return_counts=True)[1].double() / len(y)
    bits = float(-(share * share.log2()).sum() + (q != 0).double().mean())  # with the signs
    assert fit.gain == pytest.approx(saved / LAMBDA - bits, abs=0.01, rel=1e-4)


def test_what_saves_less_than_its_bits_gains_nothing():
    rng = np.random.default_rng(3)
    assert fit_class(np.abs(rng.normal(size=50_000) * 0.2)).gain < 0
    assert fit_class(np.abs(rng.normal(size=50_000))).gain > 0
    assert fit_class(np.zeros(1000)).gain == -np.inf


def test_signs_and_zero_are_kept():
    one = DeadZone(*(torch.tensor([x] * 5) for x in (0.6, 0.1, 0.05, 0.02)))
    y = torch.tensor([0.0, -0.59, 0.61, -1.7, 123456.0])
    q = one.quantize(y)
    assert q.tolist() == [0, 0, 1, -2, 123456] and q.dtype == torch.int32
    assert one.dequantize(q).tolist() == pytest.approx([0, 0, 0.95, -1.98, 123455.98])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 2.0**31])
def test_what_has_no_integer_is_refused(bad):
    one = DeadZone(*(torch.tensor([x] * 2) for x in (0.5, 0.0, 0.0, 0.0)))
    with pytest.raises(CodecError, match="coefficients"):
        one.quantize(torch.tensor([[0.0, bad]]))
