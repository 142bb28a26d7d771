"""Columns that layers lack are filled from the columns that are present, and present columns stay."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from eigen_chain import float64, rows_of, weights_of
from eigencache.codec.eigen.missing_layers import fill_missing
from eigencache.codec.eigen.transform import Prediction, Stage, StagedTransform
from eigencache.codec.layout import Layout, Part

LAYOUT = Layout(tuple(Part(i, slot, (0, 1), 2) for i in (0, 1, 2) for slot in (0, 1)), {})
BY_SLOT = Layout(tuple(Part(i, slot, (0, 1), 2) for slot in (0, 1) for i in (0, 1, 2)), {})
WIDTH = LAYOUT.width
SURE = 1e6  # variance of a coefficient over that of rounding it


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def staged(*shapes: tuple[int, int], predicted: bool = True, seed: int = 0) -> StagedTransform:
    """Orthonormal rows (columns, coefficients) of stages, each predicted from the one before."""
    stages: list[Stage] = []
    for i, (columns, count) in enumerate(shapes):
        start, prediction = (stages[-1].stop, None) if stages else (0, None)
        if stages and predicted:
            prediction = Prediction.of(draw(shapes[i - 1][0], columns, seed=seed + 50 + i), torch.ones(shapes[i - 1][0]))
        rows = torch.linalg.qr(draw(columns, columns, seed=seed + i)).Q.mT[:count]
        stages.append(Stage.of(start, rows, count, prediction))
    return StagedTransform(torch.zeros(WIDTH), tuple(stages))


def drawn(transform: StagedTransform, tokens: int, first: Tensor | None = None) -> Tensor:
    """Vectors [2, tokens, width] that coefficients of variance 1 give exactly."""
    decoded: list[Tensor] = []
    for i, stage in enumerate(transform.stages):
        expected = stage.expected(decoded[-1]) if decoded else 0.0 if first is None else first
        decoded.append(expected + draw(2, tokens, len(stage), seed=20 + i) @ stage.rows)
    return torch.cat(decoded, -1)


def lacking(x: Tensor, missing: dict[int, int], layout: Layout = LAYOUT) -> Tensor:
    """x with NaN in what layers lack."""
    holes = x.clone()
    for (a, b), part in zip(layout.spans, layout.parts, strict=True):
        holes[:, : missing.get(part.layer_idx, 0), a:b] = torch.nan
    return holes


def filled(
    x: Tensor,
    missing: dict[int, int],
    transform: StagedTransform,
    first: Tensor | None = None,
    layout: Layout = LAYOUT,
    variances: Tensor | None = None,
) -> Tensor:
    """x [batch, seq, width] with the columns filled that layers lack; asserts that the others stay."""
    holes = lacking(x, missing, layout)
    variances = torch.full((transform.coefficients,), SURE) if variances is None else variances
    found = fill_missing(holes.nan_to_num(7.0), first, missing, layout, transform, variances)
    assert torch.equal(found[~holes.isnan()], x[~holes.isnan()])
    return found


@pytest.mark.parametrize("layout", [LAYOUT, BY_SLOT], ids=["by layer", "by slot"])
@pytest.mark.parametrize("told", [False, True])
def test_vectors_of_low_rank_are_completed(layout: Layout, told: bool) -> None:
    transform = staged((WIDTH, 2))
    first = draw(2, 9, WIDTH, seed=7) if told else None
    x = drawn(transform, 9, first)
    assert torch.allclose(filled(x, {0: 4, 2: 6}, transform, first, layout), x, atol=2e-3)


def test_vectors_of_low_rank_are_completed_by_rows_that_are_not_orthonormal() -> None:
    skewed = draw(3, WIDTH, seed=4) * torch.tensor([1.0, 3.0, 0.5])[:, None]
    transform = StagedTransform(torch.zeros(WIDTH), (Stage.of(0, skewed + skewed.roll(1, 0), 1),))
    x = drawn(transform, 9)
    assert torch.allclose(filled(x, {0: 4, 2: 6}, transform), x, atol=2e-2)


@pytest.mark.parametrize("missing", [{0: 4}, {2: 6}, {0: 4, 1: 2, 2: 6}, {0: 9, 1: 9, 2: 9}])
@pytest.mark.parametrize("told", [False, True])
def test_stage_by_stage_the_most_likely_coefficients_are_those_of_numpy(missing: dict[int, int], told: bool) -> None:
    """Stages of 5 and 7 columns end within a layer; rows that are orthonormal but for rounding, and any prior."""
    transform = staged((5, 3), (7, 6))
    first = draw(2, 9, 5, seed=7) if told else None
    x, variances = draw(2, 9, WIDTH, seed=8), torch.logspace(-1, 2, 9)
    found, holes = filled(x, missing, transform, first, variances=variances), lacking(x, missing).isnan()
    for b, t in np.ndindex(2, 9):
        z, hole = float64(x[b, t]), holes[b, t].numpy()
        at = 0
        for i, stage in enumerate(transform.stages):
            here = slice(stage.start, stage.stop)
            rows, prior = rows_of(stage), float64(variances[at : at + len(stage)])
            at += len(stage)
            expected = np.zeros(stage.stop - stage.start) if first is None else float64(first[b, t])
            if i and stage.prediction is not None:
                last = transform.stages[i - 1]
                expected = z[last.start : last.stop] @ weights_of(stage.prediction)
            known = ~hole[here]
            seen = rows[:, known]
            y = np.linalg.solve(seen @ seen.T + np.diag(1 / prior), seen @ (z[here] - expected)[known])
            z[here] = np.where(known, z[here], expected + y @ rows)
        np.testing.assert_allclose(found[b, t].numpy(), z, atol=0.01)


def test_a_stage_that_is_lacking_is_what_the_one_before_predicts() -> None:
    transform = staged((4, 4), (4, 3), (4, 2))
    x = drawn(transform, 6)
    found = filled(x, {1: 6}, transform)  # all of the second stage
    torch.testing.assert_close(found[..., 4:8], transform.stages[1].expected(x[..., :4]), rtol=1e-5, atol=1e-5)
    found = filled(x, {1: 6, 2: 6}, transform)  # and what follows from it
    torch.testing.assert_close(found[..., 8:], transform.stages[2].expected(found[..., 4:8]), rtol=1e-5, atol=1e-5)


def test_a_stage_is_completed_with_what_the_stage_before_says_of_it() -> None:
    transform = staged((4, 4), (8, 2))
    x = drawn(transform, 6)
    assert torch.allclose(filled(x, {1: 6}, transform), x, atol=2e-3)
    alone = replace(transform, stages=(transform.stages[0], replace(transform.stages[1], prediction=None)))
    assert not torch.allclose(filled(x, {1: 6}, alone), x, atol=0.5)


def test_a_stage_without_coefficients_is_filled_with_what_is_expected() -> None:
    transform = staged((4, 0), (8, 0))
    x, first = draw(2, 6, WIDTH), draw(2, 6, 4, seed=7)
    found = filled(x, {0: 3, 1: 6}, transform, first)
    assert torch.equal(found[:, :3, :4], first[:, :3])
    torch.testing.assert_close(found[..., 4:8], transform.stages[1].expected(found[..., :4])[..., :4])  # type: ignore[index]


@pytest.mark.parametrize("told", [False, True])
def test_without_evidence_the_expected_vector_is_taken(told: bool) -> None:
    transform = StagedTransform(torch.zeros(WIDTH), (Stage.of(0, torch.eye(WIDTH)[:2]),))
    first = torch.arange(12.0).expand(1, 3, WIDTH) if told else None
    found = filled(draw(1, 3, WIDTH), {0: 3, 1: 3, 2: 3}, transform, first)
    assert torch.allclose(found, torch.zeros(1, 3, WIDTH) if first is None else first)


def test_a_coefficient_that_is_never_used_stays_out() -> None:
    transform = staged((WIDTH, 2))
    x = drawn(transform, 5)
    found = filled(x, {0: 5}, transform, variances=torch.tensor([SURE, 1e-9]))
    seen, whole = transform.stages[0].rows[0, 4:], transform.stages[0].rows[0]
    y = x[..., 4:] @ seen / (seen @ seen + 1e-6)
    torch.testing.assert_close(found[..., :4], y[..., None] * whole[:4], rtol=1e-2, atol=1e-2)
