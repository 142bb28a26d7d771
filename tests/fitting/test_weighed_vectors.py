"""Vectors in the metric against NumPy in float64: any columns, any tokens, without the first tokens of every sequence."""

import numpy as np
import pytest
import torch
from torch import Tensor

from eigencache.calibration.vectors import SampledVectors
from eigencache.codec.layout import Layout, Part
from eigencache.errors import StatisticsError
from eigencache.fitting.weighed_vectors import WeighedVectors, rows_after

LAYOUT = Layout(tuple(Part(i, slot, (0, 2), (3, 2)[slot]) for i in range(2) for slot in (0, 1)), {})  # widths 6 4 6 4
WIDTH, LENGTHS = LAYOUT.width, (5, 2, 1, 4)
KEPT = {0: range(12), 1: [1, 2, 3, 4, 6, 9, 10, 11], 2: [2, 3, 4, 10, 11], 4: [4]}


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def samples() -> SampledVectors:
    return SampledVectors(LAYOUT, draw(sum(LENGTHS), WIDTH), torch.arange(100, 112), LENGTHS)


def roots() -> tuple[Tensor, ...]:
    return tuple(draw(2, part.dim, part.dim, seed=i) for i, part in enumerate(LAYOUT.parts))


def expected(first: int, mean: Tensor, blocks: tuple[Tensor, ...]) -> np.ndarray:
    """(x − μ) R of all kept tokens, written once more."""
    whole, at = np.eye(WIDTH), 0
    for block in (b.double().numpy() for part in blocks for b in part):
        whole[at : at + len(block), at : at + len(block)] = block
        at += len(block)
    return (samples().vectors() - mean).double().numpy()[list(KEPT[first])] @ whole


@pytest.mark.parametrize("weighed", [True, False])
@pytest.mark.parametrize("first", KEPT)
def test_columns_are_those_of_numpy_in_float64(first: int, weighed: bool) -> None:
    mean, blocks = draw(WIDTH, seed=7), roots() if weighed else ()
    vectors = WeighedVectors(samples(), first, mean, blocks)
    z, before = expected(first, mean, blocks), vectors.samples.vectors()
    assert (len(vectors), vectors.width) == z.shape
    edges = [0, 3, 6, 8, 10, 13, 16, 18, 20]
    for start, stop in [(a, b) for a in edges for b in edges if a < b]:
        np.testing.assert_allclose(vectors.columns(start, stop), z[:, start:stop], rtol=1e-5, atol=1e-5)
    some = torch.tensor([len(z) - 1, 0])
    np.testing.assert_allclose(vectors.columns(3, 18, some), z[some.numpy(), 3:18], rtol=1e-5, atol=1e-5)
    assert torch.equal(vectors.samples.vectors(), before)  # weighing works on copies


@pytest.mark.parametrize("first", KEPT)
def test_first_tokens_are_left_out_of_every_sequence_and_short_ones_vanish(first: int) -> None:
    vectors = WeighedVectors(samples(), first, torch.zeros(WIDTH), ())
    assert vectors.rows.tolist() == rows_after(samples(), first).tolist() == list(KEPT[first])
    assert vectors.lengths == [length - first for length in LENGTHS if length > first]
    assert vectors.ids.tolist() == [100 + row for row in KEPT[first]]
    pieces = list(vectors.centered())
    assert [len(piece) for piece in pieces] == vectors.lengths
    assert torch.equal(torch.cat(pieces), samples().vectors(torch.tensor(KEPT[first])))


def test_more_first_tokens_than_any_sequence_has_are_refused() -> None:
    with pytest.raises(StatisticsError, match="No sequence is longer than 5 sinks"):
        rows_after(samples(), 5)
