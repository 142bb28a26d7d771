"""A rotation is found from its table and reproduces it at any position; tables that are no rotation are refused."""

import pytest
import torch

from eigencache.spectral.rope import PAIRINGS, Angles, Pairing, Rotation, rotate, rotation_from, unrotate

FREQUENCIES = 100.0 ** (-torch.arange(4, dtype=torch.float64) / 4)


def table(length: int, scale: float = 1.0, start: int = 0) -> Angles:
    turned = torch.arange(start, start + length, dtype=torch.float64)[:, None] * FREQUENCIES
    return Angles((scale * turned.cos()).float()[None, None], (scale * turned.sin()).float()[None, None])


@pytest.mark.parametrize("scale", [1.0, 1.3])
def test_a_rotation_is_found_from_its_table(scale: float) -> None:
    rotation = rotation_from(table(50, scale), "half")
    assert rotation is not None
    torch.testing.assert_close(rotation.frequencies, FREQUENCIES, rtol=1e-5, atol=1e-6)
    assert rotation.scale == pytest.approx(scale, rel=1e-6)
    late, expected = rotation.angles(torch.arange(500, 510)), table(10, scale, 500)
    torch.testing.assert_close(late.cos, expected.cos, rtol=0, atol=2e-3)


def test_a_table_that_is_no_rotation_is_refused() -> None:
    turned = torch.arange(50, dtype=torch.float64)[:, None].square() * FREQUENCIES
    assert rotation_from(Angles(turned.cos()[None, None], turned.sin()[None, None]), "half") is None


@pytest.mark.parametrize("pairing", PAIRINGS)
@pytest.mark.parametrize("scale", [1.0, 1.3])
def test_unrotating_by_a_found_rotation_is_undone_exactly_by_rotating(pairing: Pairing, scale: float) -> None:
    rotation = Rotation(FREQUENCIES, scale, pairing)
    x = torch.randn(2, 3, 40, 10, generator=torch.Generator().manual_seed(0))
    angles = rotation.angles(torch.arange(40))
    torch.testing.assert_close(rotate(unrotate(x, angles, pairing), angles, pairing), x, rtol=1e-5, atol=1e-5)
