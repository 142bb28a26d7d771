"""Stages of `eigen` one after the other: predicted as they are decoded, from tokens, exactly, or without coefficients."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from eigen_chain import assert_is_chain, dead_zones, float64, plain, points_of, rows_of, weights_of
from eigencache.codec.eigen.transform import Prediction, Stage, StagedTransform
from eigencache.errors import CodecError
from staged_transforms import SPANS, WIDTH, planted, weighed

SCOPES = pytest.mark.parametrize("scope", SPANS)


def turned(stages: int, columns: int = 8) -> tuple[StagedTransform, Tensor]:
    """Every stage is the one before, turned, and a little more: an error would be passed on in full."""
    generator = torch.Generator().manual_seed(0)
    turn = lambda: torch.linalg.qr(torch.randn(columns, columns, generator=generator)).Q  # noqa: E731
    made, z = [], [10 * torch.randn(4000, columns, generator=generator)]
    for i in range(stages):
        prediction = None
        if i:
            prediction = Prediction.of(turn(), torch.ones(columns))
            rest = 0.5 * torch.randn(4000, columns, generator=generator)
            z.append(z[-1] @ prediction.weights + rest)
        made.append(Stage.of(i * columns, turn().mT, 2, prediction))
    return StagedTransform(torch.zeros(stages * columns), tuple(made)), torch.cat(z, 1)


def test_errors_do_not_add_up_along_the_stages_as_they_would_without_decoding() -> None:
    transform, z = turned(12)
    count = transform.coefficients
    q = transform.quantize(z, 1.0, plain(count))
    error = (transform.dequantize(q, 1.0, plain(count)) - z).square().view(len(z), 12, -1).mean((0, 2))
    assert float(error.max()) < 1.15 / 12 and float(error.min()) > 0.85 / 12
    open_loop = []  # every stage is predicted from what it was before rounding
    for stage in transform.stages:
        expected = stage.expected(None if not stage.start else z[:, stage.start - 8 : stage.start])
        open_loop.append(((z[:, stage.start : stage.stop] - expected) @ stage.encoder).round().int())
    harmed = (transform.dequantize(torch.cat(open_loop, 1), 1.0, plain(count)) - z).square().view(len(z), 12, -1)
    assert float(harmed[:, -1].mean()) > 8 / 12


def test_a_stage_that_is_predicted_exactly_has_no_integers_and_comes_back() -> None:
    generator = torch.Generator().manual_seed(0)
    sizes, stages, z = (4, 6, 5), [], [torch.randint(-20, 21, (50, 4), generator=generator).float()]
    at = 0
    for i, size in enumerate(sizes):
        prediction = None
        if i:
            weights = torch.randint(-2, 3, (sizes[i - 1], size), generator=generator).float()
            weights[0] = 127  # the unit of a column is 1
            prediction = Prediction.of(weights, torch.ones(sizes[i - 1]))
            z.append(z[-1] @ weights)
        stages.append(Stage.of(at, torch.eye(size), 2, prediction))
        at += size
    transform, whole = StagedTransform(torch.zeros(at), tuple(stages)), torch.cat(z, 1)
    q = transform.quantize(whole, 1.0, plain(at))
    assert torch.equal(q[:, :4], z[0].int()) and not q[:, 4:].any()
    assert torch.equal(transform.dequantize(q, 1.0, plain(at)), whole)
    whole[:, 6] += 3  # of the second stage: it says so itself, and the third has to say what does not follow from it
    q = transform.quantize(whole, 1.0, plain(at))
    assert (q[:, 6] == 3).all() and not q[:, 4:6].any() and not q[:, 7:10].any()
    assert stages[2].prediction is not None
    assert torch.equal(q[:, 10:], (-3 * stages[2].prediction.weights[2]).int().expand(50, -1))
    assert torch.equal(transform.dequantize(q, 1.0, plain(at)), whole)


@SCOPES
def test_what_is_told_of_the_first_stage_is_not_coded_in_it(scope: str) -> None:
    transform = planted(scope, chained=True)[0]
    z, stop = weighed(transform), SPANS[scope][0][1]
    quantizer = dead_zones(transform.coefficients)
    q = transform.quantize(z, 0.5, quantizer, z[:, :stop])
    count = len(transform.stages[0])
    assert not q[:, :count].any()
    decoded = transform.dequantize(q, 0.5, quantizer, z[:, :stop])
    assert torch.equal(decoded[:, :stop], z[:, :stop])
    if len(transform.stages) > 1:  # which is what predicts the second
        second = transform.stages[1]
        points = points_of(q.numpy(), quantizer)[:, count : count + len(second)]
        assert second.prediction is not None
        expected = float64(z)[:, :stop] @ weights_of(second.prediction) + points @ rows_of(second) * 0.5
        np.testing.assert_allclose(decoded[:, stop : second.stop].numpy(), expected, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("empty", [(0,), (1,), (2,), (0, 1), (1, 2), (0, 1, 2)])
@pytest.mark.parametrize("told", [False, True])
def test_stages_may_be_left_without_coefficients(empty: tuple[int, ...], told: bool) -> None:
    transform = planted("layer", chained=True)[0]
    stages = tuple(
        replace(s, fine=s.fine[:0], coarse=s.coarse[:0], scale=s.scale[:0]) if i in empty else s
        for i, s in enumerate(transform.stages)
    )
    restricted = replace(transform, stages=stages)
    z = weighed(transform)
    count = WIDTH - sum(b - a for i, (a, b) in enumerate(SPANS["layer"]) if i in empty)
    assert restricted.coefficients == count
    first = z[:, :12].roll(1, 0) if told else None
    if count:
        integers = assert_is_chain(restricted, z, 0.5, dead_zones(count), first)
    else:
        integers = restricted.quantize(z, 0.5, dead_zones(0), first)
        assert integers.shape == (len(z), 0) and integers.dtype == torch.int32
    decoded = restricted.dequantize(integers, 0.5, dead_zones(count), first)
    for i in empty:
        stage = stages[i]
        expected = stage.expected(decoded[:, stages[i - 1].start : stages[i - 1].stop]) if i else first
        expected = torch.zeros(len(z), 12) if expected is None else expected
        assert torch.equal(decoded[:, stage.start : stage.stop], expected)  # type: ignore[arg-type]


def test_rows_that_depend_on_each_other_are_refused_by_the_encoder_alone() -> None:
    transform = planted("layer", chained=True)[0]
    first, second, third = transform.stages
    twice = Stage(12, 22, second.fine[:0], second.coarse[[0, 1, 0]], second.scale[[3, 4, 3]], second.prediction)
    harmed = replace(transform, stages=(first, twice, third))
    count = harmed.coefficients
    assert harmed.dequantize(torch.ones(2, count, dtype=torch.int32), 1.0, plain(count)).isfinite().all()
    with pytest.raises(CodecError, match="columns 12 to 22 has linearly dependent rows"):
        harmed.quantize(weighed(transform), 1.0, plain(count))
