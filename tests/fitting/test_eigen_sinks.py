"""Which first positions `eigen` does not code: those that cost far more than the others, in the metric."""

import pytest
import torch

from eigencache.calibration.vectors import SampledVectors
from eigencache.fitting.eigen import mean_of, outstanding
from planted_eigen import LAYOUT, WIDTH, gaussian


def samples_with(first: list[float], lengths: tuple[int, ...] = (60,) * 20) -> SampledVectors:
    """Vectors of size 1, at the first positions of the given sizes."""
    vectors = gaussian(sum(lengths), 3) / 3
    samples = SampledVectors(LAYOUT, vectors, torch.zeros(len(vectors), dtype=torch.int64), lengths)
    for position, size in enumerate(first):
        vectors[samples.positions == position] *= size
    return samples


@pytest.mark.parametrize(
    ("sizes", "sinks"),
    [([], 0), ([1.5, 1.5], 0), ([9], 1), ([20, 9, 3], 3), ([20, 1, 20], 0 + 1), ([1, 20], 0), ([9] * 30, 16)],
)
def test_sinks_are_the_first_positions_that_stand_out_without_a_gap(sizes: list[float], sinks: int) -> None:
    assert outstanding(samples_with(sizes), ()) == sinks


def test_what_costs_nothing_does_not_stand_out() -> None:
    samples = samples_with([])
    samples.stored[samples.positions == 0, :6] *= 100
    cheap = torch.eye(6).expand(2, 6, 6).clone()
    cheap[0] *= 1e-3
    rest = torch.eye(6).expand(2, 6, 6)
    assert outstanding(samples, ()) == 1
    assert outstanding(samples, (cheap, rest, rest, rest)) == 0


def test_sequences_may_differ_in_length() -> None:
    assert outstanding(samples_with([9, 9], (60, 3, 1, 40, 2)), ()) == 2


def test_the_mean_is_that_of_all_but_the_sinks() -> None:
    samples = samples_with([50, 50], (60, 3, 1, 40, 2))
    samples.stored[samples.positions < 2] += 1000
    expected = torch.cat([x[2:] for x in samples.stored.split([60, 3, 1, 40, 2])]).double().mean(0)
    torch.testing.assert_close(mean_of(samples, 2), expected.float(), rtol=0, atol=1e-5)
    assert mean_of(samples, 2).shape == (WIDTH,)
