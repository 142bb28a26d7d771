"""Columns that layers lack are filled from the columns that are present, and present columns stay."""

import torch

from eigencache.codec.eigen.missing_layers import fill_missing
from eigencache.codec.eigen.transform import Basis, JointTransform
from eigencache.codec.layout import Layout, Part

LAYOUT = Layout(tuple(Part(i, slot, (0, 1), 2) for i in (0, 1, 2) for slot in (0, 1)), {})
STEP = 1e-3


def test_vectors_of_low_rank_are_completed() -> None:
    generator = torch.Generator().manual_seed(0)
    decoder = torch.linalg.qr(torch.randn(LAYOUT.width, 2, generator=generator)).Q.mT
    transform = JointTransform(torch.zeros(LAYOUT.width), (Basis.of(0, decoder),))
    x = torch.randn(2, 9, 2, generator=generator) @ transform.decode(torch.eye(2), 1.0)
    lacking = x.clone()
    lacking[:, :4, :4] = torch.nan  # layer 0
    lacking[:, :6, 8:] = torch.nan  # layer 2
    holes = lacking.isnan()
    variances = torch.full((2,), 1 / STEP**2)
    filled = fill_missing(lacking.nan_to_num(7.0), torch.zeros(12), {0: 4, 2: 6}, LAYOUT, transform, STEP, variances)
    assert torch.allclose(filled, x, atol=2e-3)
    assert torch.equal(filled[~holes], x[~holes])


def test_without_evidence_the_expected_vector_is_taken() -> None:
    transform = JointTransform(torch.zeros(12), (Basis.of(0, torch.eye(12)[:2]),))
    expected = torch.arange(12.0)
    filled = fill_missing(torch.zeros(1, 3, 12), expected, {0: 3, 1: 3, 2: 3}, LAYOUT, transform, STEP, torch.ones(2))
    assert torch.allclose(filled, expected.expand(1, 3, 12))
