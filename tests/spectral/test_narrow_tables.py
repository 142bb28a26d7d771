"""A rotation is identified from the rounded table of a 16-bit model."""

import math

import pytest
import torch

from eigencache.spectral.rope import Angles, rotation_from

FREQUENCIES = 500_000.0 ** (-torch.arange(32, dtype=torch.float64) / 32)


def rounded(dtype: torch.dtype, positions: int, scale: float = 1.0) -> Angles:
    turned = torch.arange(positions, dtype=torch.float64)[:, None] * FREQUENCIES
    return Angles(*((scale * part).to(dtype)[None, None] for part in (turned.cos(), turned.sin())))


@pytest.mark.parametrize("scale", [1.0, 1.2079])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_frequencies_are_fitted_to_all_positions(dtype: torch.dtype, scale: float) -> None:
    rotation = rotation_from(rounded(dtype, 512, scale), "half")
    assert rotation is not None
    far = 4096 * (rotation.frequencies - FREQUENCIES).abs().max()
    first = 4096 * (torch.atan2(*(getattr(rounded(dtype, 2), x)[0, 0, 1].double() for x in ("sin", "cos"))) - FREQUENCIES)
    assert far < 0.01 < first.abs().max()  # radians
    assert rotation.scale == pytest.approx(scale, rel=1e-3)


@pytest.mark.parametrize("positions", [2, 3, 64, 100])
def test_any_number_of_positions_will_do(positions: int) -> None:
    rotation = rotation_from(rounded(torch.float64, positions), "half")
    assert rotation is not None
    torch.testing.assert_close(rotation.frequencies, FREQUENCIES, rtol=1e-9, atol=1e-12)


def test_a_table_of_one_position_and_one_of_zeros_are_no_rotation() -> None:
    assert rotation_from(rounded(torch.float32, 1), "half") is None
    zeros = torch.zeros(1, 1, 8, 4)
    assert rotation_from(Angles(zeros, zeros), "half") is None


def test_pairs_may_turn_by_almost_half_a_round_per_position() -> None:
    turned = torch.arange(64, dtype=torch.float64)[:, None] * torch.tensor([0.97 * math.pi])
    rotation = rotation_from(Angles(turned.cos().bfloat16()[None, None], turned.sin().bfloat16()[None, None]), "half")
    assert rotation is not None
    assert float(rotation.frequencies) == pytest.approx(0.97 * math.pi, abs=1e-4)
