"""An attention sink may have a small key and a small value: every codec stores the first tokens exactly by default."""

import functools
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from eigencache.calibration.calibration_set import CalibrationSet
from eigencache.calibration.session import Session
from eigencache.codec.base import Cached
from eigencache.codec.eigen.codec import EigenCodec
from eigencache.codec.live.codec import LiveCodec
from eigencache.codec.pca import PCACodec
from eigencache.codec.sinks_and_window import FIRST_EXACT
from eigencache.fitting.eigen import EigenSettings, fit_eigen
from eigencache.fitting.live import LiveSettings, fit_live
from eigencache.fitting.pca import PCACalibration
from eigencache.fitting.pca_settings import PCASettings
from eigencache.models.tapped_cache import tapped_cache
from stub_codecs import random_sequences, tiny_loaded

LENGTH, TOKENS = 40, 140  # of calibration and of what is encoded
Codec = PCACodec | EigenCodec | LiveCodec


@functools.cache
def source() -> CalibrationSet:
    return CalibrationSet(Session(tiny_loaded("llama")), random_sequences(*(LENGTH,) * 24))


def pca(sinks: int | None) -> PCACodec:
    settings = PCASettings("kv") if sinks is None else PCASettings("kv", sinks=sinks)
    return PCACalibration(Session(source().session.loaded), source().sequences).fit(settings).truncated(6)


def eigen(sinks: int | None) -> EigenCodec:
    fit = fit_eigen(source(), EigenSettings(sinks=sinks))
    return fit.at_step(fit.spread).codec


def live(sinks: int | None) -> LiveCodec:
    return fit_live(source(), LiveSettings() if sinks is None else LiveSettings(sinks=sinks)).at_bits(2.0)


@torch.no_grad()
def cache_with_sink() -> Cached:
    """A cache whose first token has a tenth of the others' key and value, in directions of its own."""
    ids = torch.randint(1, 100, (1, TOKENS), generator=torch.Generator().manual_seed(3))
    cache, stored = tapped_cache(source().session.loaded.model)
    source().session.loaded.model(input_ids=ids, past_key_values=cache, use_cache=True)
    generator = torch.Generator().manual_seed(4)
    for both in stored.values():
        for x in both:
            size = x[:, :, 1:].norm(dim=-1).mean()
            direction = torch.randn(x[:, :, 0].shape, generator=generator)
            x[:, :, 0] = 0.1 * size * direction / direction.norm(dim=-1, keepdim=True)
    return stored


@pytest.mark.parametrize("made", [pca, eigen, live])
def test_a_sink_of_small_norm_is_exact_by_default_and_ruined_when_it_is_packed(made: Callable[[int | None], Codec]) -> None:
    given = cache_with_sink()

    def error(codec: Codec) -> float:
        """Of what heads get that attend to the sink alone: its value, of every layer."""
        decoded = codec.decode(codec.encode(given, 0))  # type: ignore[arg-type]
        right, found = (torch.stack([both[1][:, :, 0] for both in x.values()]) for x in (given, decoded))
        return float((found - right).norm() / right.norm())

    default = made(None)
    decoded = default.decode(default.encode(given, 0))  # type: ignore[arg-type]
    for layer_idx, both in given.items():
        for x, found in zip(both, decoded[layer_idx], strict=True):
            assert torch.equal(found[:, :, :FIRST_EXACT], x[:, :, :FIRST_EXACT].half().float())
    assert error(default) < 0.001 < 0.5 < error(made(0))


def test_what_is_stored_exactly_is_counted() -> None:
    given, numbers = cache_with_sink(), sum(x[:, :, 0].numel() for both in cache_with_sink().values() for x in both)
    assert FIRST_EXACT == 4 and source().session.loaded.geometry.values_per_token == numbers
    with_sinks = pca(None)
    without = replace(with_sinks, sinks=0)
    assert with_sinks.encode(given, 0).nbytes == with_sinks.payload_nbytes(TOKENS, 0)
    coefficients = sum(group.transform.rank for group in without.groups)
    assert with_sinks.encode(given, 0).nbytes - without.encode(given, 0).nbytes == 4 * 2 * (numbers - coefficients)
    coded = live(None)
    assert (coded.sinks, live(0).sinks) == (4, 0)
    assert coded.encode(given, 0).nbytes == coded.nbytes_of(TOKENS)


@pytest.mark.parametrize("tokens", [1, 3, 4, 5, 70])
@pytest.mark.parametrize("start", [0, 2, 4, 9])
@pytest.mark.parametrize("bits", [16, 4])
def test_stretches_of_any_length_and_start_keep_the_positions_that_are_first(tokens: int, start: int, bits: int) -> None:
    codec = pca(None).truncated(6, bits=bits)  # type: ignore[arg-type]
    given = {i: (keys[:, :, :tokens], values[:, :, :tokens]) for i, (keys, values) in cache_with_sink().items()}
    encoded = codec.encode(given, start)
    decoded, exact = codec.decode(encoded), max(0, min(tokens, FIRST_EXACT - start))
    for layer_idx, both in given.items():
        for x, found in zip(both, decoded[layer_idx], strict=True):
            assert found.shape == x.shape and torch.equal(found[:, :, :exact], x[:, :, :exact].half().float())
    if start == 0:
        assert encoded.nbytes == codec.payload_nbytes(tokens, 0)
