"""A sample of all layers is spread over the text and does not depend on the batches."""

from itertools import pairwise

import torch
from hypothesis import given
from hypothesis import strategies as st

from eigencache.calibration.sampling import Sampling


def collected(step: int, lengths: list[int], batch: int) -> Sampling:
    sampling = Sampling(step)
    for first in range(0, len(lengths), batch):
        part = lengths[first : first + batch]
        numbers = torch.arange(max(part)) + 1000 * torch.arange(first, first + len(part))[:, None]
        layers = [numbers[:, None, :, None].expand(-1, 2, -1, 3) + layer / 4 for layer in range(2)]
        sampling.add(layers, range(first, first + len(part)), part)
    return sampling


@given(st.integers(1, 7), st.lists(st.integers(7, 20), min_size=1, max_size=9), st.integers(1, 4))
def test_every_token_at_the_step_is_kept_whatever_the_batches(step: int, lengths: list[int], batch: int) -> None:
    sample, other = (collected(step, lengths, size).sample for size in (batch, len(lengths)))
    torch.testing.assert_close(sample.x, other.x)
    assert sample.lengths == other.lengths
    assert sample.x.shape == (sum(sample.lengths), 12)
    assert all(length // step <= kept <= -(-length // step) for length, kept in zip(lengths, sample.lengths, strict=True))
    for rows in sample.x.split(list(sample.lengths)):
        assert (rows[:, :6] + 0.25 == rows[:, 6:]).all()
        assert (rows[1:, 0] - rows[:-1, 0] == step).all()


def test_short_sequences_are_chosen_evenly() -> None:
    kept = sorted(collected(10, [2] * 100, 8)._kept)
    assert len(kept) > 10
    assert max(b - a for a, b in pairwise(kept)) < 12
