"""Codecs fitted on a model with dead dimensions decode these as the constants that they are, from no coefficient."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from baseline_caches import relative_error
from codec_folders import ORIGIN
from dead_gemma import CONSTANTS, DEAD_KEYS, PAIR, SINGLE, dead_gemma
from eigencache.calibration.calibration_set import CalibrationSet
from eigencache.calibration.session import Session
from eigencache.calibration.vectors import SampledVectors
from eigencache.codec.base import Cached, Codec
from eigencache.codec.baselines.registry import baselines
from eigencache.codec.eigen.codec import EigenCodec
from eigencache.codec.layout import Layout, Part
from eigencache.codec.saved.folder import load_codec
from eigencache.fitting.eigen import EigenFit, EigenSettings, fit_eigen
from eigencache.fitting.live import fit_live
from eigencache.fitting.pca import PCACalibration
from eigencache.fitting.pca_settings import PCASettings
from eigencache.geometry import geometry_from_config
from eigencache.models.folding import bases_of
from eigencache.models.load import LoadedModel, with_evidence
from eigencache.models.tapped_cache import tapped_cache
from eigencache.spectral.rope import PAIRINGS, Angles, Pairing, Rotation, rotate
from eigencache.studies.bench.context import BenchContext
from saved_eigen import saved
from stub_codecs import random_sequences

pytestmark = pytest.mark.slow

LIVE_KEYS = 16 - len(DEAD_KEYS)
SINKS = 4


@functools.cache
def loaded(dtype: torch.dtype = torch.float32) -> LoadedModel:
    model = dead_gemma().to(dtype)
    return LoadedModel("dead", model, None, with_evidence(geometry_from_config(model.config), model))  # type: ignore[arg-type]


@functools.cache
def calibration(dtype: torch.dtype = torch.float32) -> CalibrationSet:
    return CalibrationSet(Session(loaded(dtype)), random_sequences(*(60,) * 64))


@functools.cache
def fitted(settings: EigenSettings) -> EigenFit:
    return fit_eigen(calibration(), settings)


@torch.no_grad()
def cached(dtype: torch.dtype = torch.float32) -> Cached:
    model = loaded(dtype).model
    cache, stored = tapped_cache(model)
    ids = torch.stack([torch.from_numpy(x) for x in random_sequences(60, 60, seed=9).ids])
    model.base_model(input_ids=ids, past_key_values=cache, use_cache=True)
    return stored


def assert_exact(keys: Tensor, values: Tensor) -> None:
    """The dead dimensions of one layer in the cache, keys after rotation [batch, 2, seq, 16], are what they always are."""
    assert not keys[..., list(PAIR)].any()
    for place, constant in CONSTANTS.items():
        x = values[:, place // 16, :, place % 16]
        assert torch.equal(x, torch.full_like(x, constant))


def check(codec: Codec, dtype: torch.dtype = torch.float32) -> None:
    stored = cached(dtype)
    for layer_idx, (keys, values) in codec.decode(codec.encode(stored, 0)).items():
        assert_exact(keys[:, :, SINKS:], values[:, :, SINKS:])
        assert keys.isfinite().all() and values.isfinite().all()
        assert float((keys - stored[layer_idx][0]).abs().max()) > 0  # the other dimensions are not


@pytest.mark.parametrize("name", ["k", "v"])
@pytest.mark.parametrize("metric", ["frobenius", "fisher"])
@pytest.mark.parametrize("frame", ["pre", "post"])
@pytest.mark.parametrize("scope", ["head", "layer"])
def test_pca_has_as_many_coefficients_as_dimensions_vary(scope: str, frame: str, metric: str, name: str) -> None:
    source = PCACalibration(calibration().session, calibration().sequences, ("head", "layer"))
    codec = source.fit(PCASettings(name, scope, frame, metric, sinks=SINKS))  # type: ignore[arg-type]
    slot = "kv".index(name)
    live = [[LIVE_KEYS if frame == "pre" else 16 - len(PAIR)] * 2, [15, 15]][slot]
    ranks = [group.transform.rank for group in codec.groups]
    assert ranks == (live * 4 if scope == "head" else [sum(live)] * 4)
    stored = cached()
    for rank in (1, codec.rank):
        few = codec.truncated(rank)
        for layer_idx, both in few.decode(few.encode(stored, 0)).items():
            keys, values = (x[:, :, SINKS:] for x in (both if slot else (both[0], stored[layer_idx][1])))
            assert_exact(keys if name == "k" else stored[layer_idx][0], values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dimensions_that_vary_are_found_before_rotation(dtype: torch.dtype) -> None:
    """A pair is exactly zero in any dtype; half of a pair only where the cache is not rounded to 16 bits."""
    samples = calibration(dtype).samples
    for part, live in zip(samples.layout.parts, samples.live, strict=True):
        dead = [(~head).nonzero().flatten().tolist() for head in live]
        keys = list(DEAD_KEYS) if dtype == torch.float32 else list(PAIR)
        assert dead == ([[3], [4]] if part.slot else [keys, keys])
    before = samples.vectors(start=SINGLE, stop=SINGLE + 1)
    assert 0 < float(before.double().std()) < (1e-6 if dtype == torch.float32 else 1e-2)  # rounding of the rotation


@pytest.mark.parametrize("pairing", PAIRINGS)
@pytest.mark.parametrize(("size", "alive"), [(0.0, False), (1e-2, True)])
def test_angles_that_are_rounded_at_far_positions_do_not_bring_a_dimension_to_life(
    pairing: Pairing, size: float, alive: bool
) -> None:
    """Half of a pair, beside a partner of deviation 1, on 4,096 positions whose angles a model computes in float32."""
    theta = 0.7 * 100.0 ** -(torch.arange(4, dtype=torch.float64) / 4)
    layout = Layout((Part(0, 0, (0, 1), 10),), {0: (0, Rotation(theta, 1.0, pairing))})
    x = torch.from_numpy(np.random.default_rng(0).normal(size=(1, 1, 4096, 10))).float()
    x[..., 0] *= size
    angles = torch.arange(4096).float()[:, None] * theta.float()
    stored = rotate(x, Angles(angles.cos()[None, None], angles.sin()[None, None]), pairing)
    vectors = layout.vectors({0: (stored, stored)}, 0)[0]
    assert float(vectors[:, 0].std()) > 1e-6  # more than float32 rounds numbers of size 1
    live = SampledVectors(layout, vectors, torch.zeros(4096, dtype=torch.int64), (4096,)).live
    assert live[0].tolist() == [[alive] + [True] * 9]


@pytest.mark.parametrize(
    "settings",
    [
        EigenSettings(sinks=SINKS),
        EigenSettings("joint", sinks=SINKS),
        EigenSettings("head", text=False, sinks=SINKS),
        EigenSettings(metric="frobenius", sinks=SINKS),
        EigenSettings(metric="attention", alpha=1.0, sinks=SINKS, group=2),
    ],
    ids=EigenSettings.describe,
)
def test_eigen_decodes_them_exactly_at_any_step(settings: EigenSettings) -> None:
    fit = fitted(settings)
    for step in (fit.spread / 64, fit.spread):
        check(fit.at_step(step).codec)
    live = torch.cat([part.flatten() for part in calibration().samples.live])
    finest = fit.at_step(fit.spread / 4096).codec.transform
    assert (len(live), int(live.sum())) == (256, 224) and finest.coefficients <= 224


def test_eigen_stores_and_loads_a_metric_with_rows_of_zeros(tmp_path: Path) -> None:
    fit = fitted(EigenSettings(sinks=SINKS, text=False))
    codec = fit.at_step(fit.spread / 8).codec
    assert all((blocks == 0).all(-1).any() for blocks in codec.transform.inverse_roots)
    again = load_codec(saved(tmp_path, codec, ORIGIN)).codec
    assert isinstance(again, EigenCodec)
    check(again)
    assert again.encode(cached(), 0).rows == codec.encode(cached(), 0).rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", [2.0, 4.0, 8.0])
def test_the_live_codec_decodes_them_exactly(bits: float, dtype: torch.dtype) -> None:
    fit = fit_live(calibration(dtype))
    for (_, slot), found in fit.slots.items():  # all others gain nothing from a bit
        assert int((found.costs[0] > 1e-9).sum()) == 2 * (15 if slot else 16 - len(PAIR))
    codec = fit.at_bits(bits)
    positions = torch.arange(64)[None].expand(2, -1)
    for layer_idx, both in cached(dtype).items():
        slots = [torch.cat([x, x[:, :, :4]], 2) for x in both]  # a whole block of 64
        keys, values = (
            heads.decode(heads.encode(x, positions), positions).to(dtype)
            for heads, x in zip(codec.layers[layer_idx], slots, strict=True)
        )
        assert_exact(keys, values)
        assert keys.isfinite().all() and values.isfinite().all()


def test_heads_of_different_ranks_are_folded_with_coefficients_of_zero() -> None:
    source = PCACalibration(calibration().session, calibration().sequences, ("head",))
    codec = source.fit(PCASettings("v", frame="post"))
    group = codec.groups[0]
    narrow = type(codec)("one", (type(group)(group.parts, group.transform.truncated(9)), *codec.groups[1:]), {}, codec.dtype)
    heads = bases_of(narrow, torch.float32, torch.device("cpu"))[0, 1]
    assert [t.rank for t in heads] == [15, 15]
    x = cached()[0][1][0, 0]
    assert not heads[0].encode(x)[:, 9:].any()
    torch.testing.assert_close(
        heads[0].decode(heads[0].encode(x)), group.transform.truncated(9).decode(group.transform.truncated(9).encode(x))
    )


@pytest.mark.parametrize("name", sorted(set(baselines()) - {"xquant"}))  # which refuses key norms
def test_baselines_do_not_fail_on_them(name: str) -> None:
    bench = BenchContext(calibration().session, calibration().sequences, (2.0, 4.0))
    for codec in baselines()[name].codecs(bench).values():
        stored = cached()
        for keys, values in codec.decode(codec.encode(stored, 0)).values():
            assert keys.isfinite().all() and values.isfinite().all()
        assert relative_error(stored, codec.decode(codec.encode(stored, 0))) < 0.4
