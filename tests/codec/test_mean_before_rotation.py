"""The rotated mean equals the model's own rotation of the mean, at every position of every row."""

import pytest
import torch

from eigencache.codec.mean_before_rotation import rotated_mean
from eigencache.spectral.rope import PAIRINGS, Pairing, Rotation, rotate


@pytest.mark.parametrize("pairing", PAIRINGS)
def test_every_row_is_the_mean_rotated_to_its_positions(pairing: Pairing) -> None:
    rotation = Rotation(torch.tensor([1.0, 0.1, 0.01], dtype=torch.float64), 1.2, pairing)
    mean = torch.randn(2, 8, generator=torch.Generator().manual_seed(0))
    positions = torch.tensor([[0, 1, 5000], [-7, 3, 3]])
    found = rotated_mean(mean, rotation, positions)
    assert found.shape == (2, 2, 3, 8) and found.dtype == torch.float32
    for row, of_row in zip(found, positions, strict=True):
        expected = rotate(mean[None, :, None].expand(1, 2, 3, 8), rotation.angles(of_row), pairing)
        assert torch.equal(row[None], expected)
