"""What positions add is found where there is something, is not made up where there is nothing, and takes no bits."""

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from eigencache.calibration.calibration_set import CalibrationSet, calibration_length
from eigencache.calibration.session import Session
from eigencache.calibration.vectors import SampledVectors
from eigencache.codec.layout import Layout, Part
from eigencache.codec.saved.folder import load_codec, save_codec
from eigencache.evaluate.prefix import read_prefix
from eigencache.fitting.eigen import EigenFit, EigenSettings, fit_eigen
from eigencache.fitting.position_means import fit_positions
from eigencache.fitting.provenance import eigen_fitting_of
from eigencache.models.codec_check import codec_for
from eigencache.models.load import LoadedModel
from eigencache.records.fit import Expected
from eigencache.records.provenance import Stopwatch
from eigencache.spectral.metric import block_product
from stub_codecs import random_sequences, tiny_loaded
from tiny_models import tiny, token_ids

LAYOUT = Layout((Part(0, 0, (0, 2), 6), Part(0, 1, (0, 2), 6)), {})
POSITIONS, SEQUENCES = 30, 60
SETTINGS = EigenSettings(metric="frobenius", block=16)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def samples_of(vectors: Tensor) -> SampledVectors:
    """Sequences one after the other of [sequences, positions, width]."""
    count, length, _ = vectors.shape
    x = vectors.flatten(0, 1)
    return SampledVectors(LAYOUT, x - x.mean(0), torch.zeros(len(x), dtype=torch.int64), (length,) * count)


@pytest.mark.parametrize("weighed", [False, True])
def test_planted_means_are_found_in_their_directions(weighed: bool) -> None:
    planted = 5 * draw(POSITIONS, 2, seed=1) @ draw(2, LAYOUT.width, seed=2)
    planted = planted - planted.mean(0)
    blocks = [torch.diag_embed(0.5 + draw(2, 6, seed=3).abs()) for _ in LAYOUT.parts] if weighed else []
    samples = samples_of(planted + draw(SEQUENCES, POSITIONS, LAYOUT.width))
    means = fit_positions(samples, blocks, [block.inverse() for block in blocks])
    assert means is not None and means.rows.shape == (2, LAYOUT.width)
    error = means.at(torch.arange(POSITIONS)) - planted
    assert float(error.square().mean()) < 2 / SEQUENCES * 2 / LAYOUT.width * 2  # two of the directions carry noise
    assert torch.equal(means.at(torch.tensor([POSITIONS + 5])), means.at(torch.tensor([POSITIONS - 1])))
    left = samples.less_positions(means).vectors().view(SEQUENCES, POSITIONS, -1).mean(0)
    assert block_product(left, blocks).abs().max() < 1.5


def test_chance_is_not_taken_for_positions() -> None:
    assert fit_positions(samples_of(draw(SEQUENCES, POSITIONS, LAYOUT.width)), (), ()) is None


# Models


def placed(weight: float) -> LoadedModel:
    """A tiny GPT-2 whose positions weigh more than its tokens."""
    loaded = tiny_loaded("gpt2")
    model = copy.deepcopy(tiny("gpt2"))
    with torch.no_grad():
        model.transformer.wpe.weight.mul_(weight)
    return LoadedModel("placed", model, None, loaded.geometry)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def fit() -> tuple[LoadedModel, EigenFit]:
    loaded = placed(20.0)
    return loaded, fit_eigen(CalibrationSet(Session(loaded), random_sequences(*(64,) * 24)), SETTINGS)


def test_positions_take_no_bits(fit: tuple[LoadedModel, EigenFit], monkeypatch: pytest.MonkeyPatch) -> None:
    loaded, known = fit
    assert known.positions is not None
    monkeypatch.setattr("eigencache.fitting.eigen.fit_positions", lambda *_: None)
    unknown = fit_eigen(CalibrationSet(Session(loaded), random_sequences(*(64,) * 24)), SETTINGS)
    step = known.spread / 16
    assert known.at_step(step).coded_bits < 0.9 * unknown.at_step(step).coded_bits


def test_models_with_rotation_have_none() -> None:
    assert (
        fit_eigen(CalibrationSet(Session(tiny_loaded("llama")), random_sequences(*(40,) * 16)), SETTINGS).positions is None
    )


@pytest.mark.parametrize("start", [0, 9])
def test_a_container_knows_where_its_tokens_stand(fit: tuple[LoadedModel, EigenFit], start: int) -> None:
    loaded, fitted = fit
    with torch.no_grad():
        whole = read_prefix(loaded, token_ids(length=50)).stored
    cached = {i: (keys[:, :, start:], values[:, :, start:]) for i, (keys, values) in whole.items()}
    codec = fitted.at_step(fitted.spread / 128).codec
    encoded = codec.encode(cached, start)
    decoded = codec.decode(encoded)
    for layer_idx, both in cached.items():
        for x, found in zip(both, decoded[layer_idx], strict=True):
            assert float((found - x).square().mean() / x.square().mean()) < 1e-3
    part = codec.decode(encoded, slice(17, 23))
    assert all(torch.equal(part[i][0], decoded[i][0][:, :, 17:23]) for i in part)


def test_they_are_saved_and_decide_what_bytes_mean(fit: tuple[LoadedModel, EigenFit], tmp_path: Path) -> None:
    loaded, fitted = fit
    codec = fitted.at_step(fitted.spread / 16).codec
    expected = Expected(
        context=64, bits_per_value=1.0, coded_bits=9.0, tokens=9, delta_nll=0.0, delta_nll_interval=None, kl=0.0,
        top1_agreement=1.0,
    )  # fmt: skip
    run = Stopwatch().run(0, {})
    save_codec(tmp_path / "codec", codec, *eigen_fitting_of(SETTINGS, expected, loaded, random_sequences(64), run))
    saved = codec_for(load_codec(tmp_path / "codec"), loaded)
    with torch.no_grad():
        cached = read_prefix(loaded, token_ids()).stored
    assert saved.encode(cached, 0).rows == codec.encode(cached).rows  # type: ignore[union-attr]
    assert replace(codec, positions=None).sha256 != codec.sha256 == saved.sha256  # type: ignore[union-attr]
    assert codec.nbytes - replace(codec, positions=None).nbytes == sum(t.nbytes for t in codec.positions.tensors())  # type: ignore[union-attr]


def test_learned_positions_are_all_calibrated() -> None:
    assert calibration_length(tiny_loaded("gpt2")) == tiny("gpt2").config.max_position_embeddings
    assert calibration_length(tiny_loaded("llama")) <= 512
