"""A basis of all layers from a sample equals one from the full matrices, and has no more directions than it may."""

import pytest
import torch

from eigencache.errors import StatisticsError
from eigencache.fitting.wide_pca import fit_wide_transform
from eigencache.spectral.metric import block_diagonal, regularized
from eigencache.spectral.moments import Moments
from eigencache.spectral.transform import fit_transform
from eigencache.spectral.wide import Sample

WIDTH, HEADS = 48, 4


def drawn(n: int, seed: int = 0) -> Sample:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(WIDTH, WIDTH, generator=generator) * torch.logspace(0, -2, WIDTH)[:, None]
    x = torch.randn(n, WIDTH, generator=generator) @ mix + 1
    x[:, 5] = 0.25  # a dead dimension
    return Sample(x, (n // 8,) * 8)


def metric(seed: int = 1) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    roots = torch.randn(HEADS, WIDTH // HEADS, WIDTH // HEADS, generator=generator, dtype=torch.float64)
    return list(roots @ roots.mT)


@pytest.mark.parametrize("centered", [True, False])
@pytest.mark.parametrize("blocks", [[], metric()], ids=["frobenius", "metric"])
def test_it_is_the_leading_part_of_the_transform_of_the_matrix(blocks: list[torch.Tensor], centered: bool) -> None:
    sample = drawn(400)
    wide, independent = fit_wide_transform(sample, blocks, alpha=1, centered=centered, contexts=10**6)
    moments = Moments(WIDTH)
    moments.update(sample.x.unsqueeze(1), sample.lengths)
    weights = regularized(block_diagonal(blocks)) if blocks else None
    full = fit_transform(moments.total(), metric=weights, centered=centered)
    assert wide.rank == min(int(independent / 10), full.rank)
    torch.testing.assert_close(wide.spectrum.double(), full.spectrum, rtol=1e-3, atol=1e-4 * float(full.spectrum[0]))
    part = full.truncated(wide.rank).to(torch.float32)
    found, expected = (transform.decode(transform.encode(sample.x)) for transform in (wide, part))
    assert (found - expected).abs().max() < 1e-3 * sample.x.abs().max()


def test_fewer_vectors_than_dimensions_carry_a_tenth_as_many_directions() -> None:
    sample = drawn(40)
    wide, independent = fit_wide_transform(sample, metric(), alpha=1, centered=True, contexts=10**6)
    assert independent <= 40
    assert wide.rank == int(independent / 10)
    x = sample.x
    again = wide.decode(wide.encode(wide.decode(wide.encode(x))))
    torch.testing.assert_close(again, wide.decode(wide.encode(x)), rtol=1e-3, atol=1e-3)  # a projection


def test_a_dead_dimension_is_decoded_as_its_mean() -> None:
    sample = drawn(400)
    wide, _ = fit_wide_transform(sample, metric(), alpha=1, centered=True, contexts=10**6)
    assert not wide.encoder[5].any()
    torch.testing.assert_close(wide.decode(wide.encode(sample.x))[:, 5], sample.x[:, 5])


def test_repeated_text_carries_no_basis() -> None:
    with pytest.raises(StatisticsError, match="9 independent vectors are too few for a basis of all layers"):
        fit_wide_transform(drawn(400), [], alpha=1, centered=True, contexts=9)
