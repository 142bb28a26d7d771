"""The metric of rotated queries equals a brute-force sum over logits; the two roots are inverse to each other."""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pytest
import torch

from eigencache.errors import StatisticsError
from eigencache.spectral.metric import block_diagonal, block_product, blocks_between, lag_averaged, regularized, roots
from eigencache.spectral.rope import PAIRINGS, Pairing, Rotation, rotate

DIM = 10


def positive(width: int, seed: int = 0) -> torch.Tensor:
    x = torch.randn(width, 3 * width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x @ x.mT / width


def test_roots_are_inverse_to_each_other_and_square_to_the_metric() -> None:
    metric = positive(DIM)
    root, inverse = roots(metric)
    torch.testing.assert_close(root @ root, metric)
    torch.testing.assert_close(root @ inverse, torch.eye(DIM, dtype=torch.float64))
    half, _ = roots(metric, 0.5)
    torch.testing.assert_close(half @ half, root)
    torch.testing.assert_close(roots(metric, 0)[0], torch.eye(DIM, dtype=torch.float64))


def test_a_singular_metric_becomes_positive_definite_by_a_share_of_its_trace() -> None:
    singular = torch.diag(torch.tensor([3.0, 1.0, 0.0, 0.0], dtype=torch.float64))
    expected = singular + 1e-3 * torch.eye(4, dtype=torch.float64)
    torch.testing.assert_close(regularized(singular, 1e-3), expected)


@pytest.mark.parametrize("bad", [torch.zeros(2, 2), torch.full((2, 2), torch.nan)])
def test_a_metric_that_weighs_nothing_is_refused(bad: torch.Tensor) -> None:
    with pytest.raises(StatisticsError, match="the metric has a trace of"):
        regularized(bad.double())


@pytest.mark.parametrize("pairing", PAIRINGS)
@pytest.mark.parametrize("scale", [1.0, 1.4])
def test_the_lag_averaged_metric_is_the_mean_squared_logit_error(pairing: Pairing, scale: float) -> None:
    generator = torch.Generator().manual_seed(1)
    rotation = Rotation(
        10.0 ** (-torch.arange(4, dtype=torch.float64) / 2), scale, pairing
    )  # 8 of 10 dimensions are rotated
    queries = torch.randn(200, DIM, generator=generator, dtype=torch.float64) @ positive(DIM, 2)
    error = torch.randn(DIM, generator=generator, dtype=torch.float64)
    lags = torch.tensor([0.5, 0.0, 0.3, 0.2], dtype=torch.float64)
    key_at = 7
    expected = 0.0
    for lag, share in enumerate(lags.tolist()):
        at = rotation.angles(torch.tensor([key_at + lag] * len(queries)))
        turned = rotate(queries[None, None], at, pairing)[0, 0]
        key = rotate(error[None, None, None], rotation.angles(torch.tensor([key_at])), pairing)[0, 0, 0]
        expected += share * float((turned @ key).square().mean())
    metric = lag_averaged(queries.mT @ queries / len(queries), rotation, lags)
    assert float(error @ metric @ error) == pytest.approx(expected, rel=1e-5)


def test_metrics_of_parts_do_not_mix() -> None:
    joined = block_diagonal([positive(2), positive(3)])
    assert joined.shape == (5, 5)
    assert np.count_nonzero(joined[:2, 2:]) == 0


def heads_of(count: int, dim: int) -> torch.Tensor:
    return torch.randn(count, dim, dim, generator=torch.Generator().manual_seed(10 * count + dim))


def whole(blocks: Sequence[torch.Tensor]) -> torch.Tensor:
    return block_diagonal([head for part in blocks for head in part])


def test_blocks_between_two_borders_are_that_part_of_the_matrix() -> None:
    blocks = [heads_of(2, 3), heads_of(1, 3), heads_of(3, 2), heads_of(1, 4)]
    matrix, borders = whole(blocks), [0, 3, 6, 9, 11, 13, 15, 19]
    x = torch.randn(5, 19, generator=torch.Generator().manual_seed(0))
    for start, stop in ((a, b) for a in borders for b in borders if a < b):
        chosen = blocks_between(blocks, start, stop)
        assert torch.equal(whole(chosen), matrix[start:stop, start:stop])
        widths = [part.shape[1] for part in chosen]
        assert all(a != b for a, b in pairwise(widths))  # neighbors of one width are in one tensor
        torch.testing.assert_close(
            block_product(x[:, start:stop], chosen), x[:, start:stop] @ matrix[start:stop, start:stop]
        )


def test_between_no_blocks_there_are_none_and_nothing_is_multiplied() -> None:
    x = torch.randn(3, 5)
    assert blocks_between([], 1, 4) == [] and block_product(x, []) is x
    assert blocks_between([heads_of(2, 3)], 3, 3) == []
