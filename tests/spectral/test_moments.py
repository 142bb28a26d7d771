"""Streamed moments equal those of NumPy in float64 for any division of the data, in constant memory."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eigencache.errors import StatisticsError
from eigencache.spectral.moments import Moments
from simulated import repeatable

TOLERANCE = {torch.float64: 1e-12, torch.float32: 3e-6, torch.bfloat16: 3e-6, torch.float16: 3e-6}  # sums of n in float32
UNEQUAL = (1, 40, 7, 300, 2, 150)


def data_of(seed: int, n: int, blocks: int, width: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Return correlated vectors with a nonzero mean, [n, blocks, width]."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(blocks, width, width, generator=generator, dtype=torch.float64)
    x = torch.einsum("nbi,bij->nbj", torch.randn(n, blocks, width, generator=generator, dtype=torch.float64), mixing)
    return (x + torch.randn(blocks, width, generator=generator, dtype=torch.float64)).to(dtype)


def assert_close(got: torch.Tensor, expected: np.ndarray | torch.Tensor, tolerance: float) -> None:
    """Assert equality to within `tolerance` of the largest expected value."""
    expected = np.asarray(expected)
    assert got.shape == expected.shape
    assert np.abs(got.numpy() - expected).max(initial=0) <= tolerance * np.abs(expected).max(initial=0)


def assert_same(got: Moments, expected: Moments, tolerance: float = 1e-12) -> None:
    """Assert equal counts, means and scatters in every fold, and equal scatter between sequences."""
    assert torch.equal(got.count, expected.count)
    assert got.sequences == expected.sequences
    for block in range(expected.blocks):
        assert_close(got.between_sequences(block), expected.between_sequences(block), tolerance)
        for fold in expected.count.nonzero().flatten().tolist():
            mine, other = (moments.total(block, [fold]) for moments in (got, expected))
            assert_close(mine.mean, other.mean, tolerance)
            assert_close(mine.scatter, other.scatter, tolerance)


def between_in_numpy(x: np.ndarray, lengths: Sequence[int]) -> np.ndarray:
    """Return Σ_s n_s (m_s − m)(m_s − m)ᵀ of vectors [n, width]."""
    means = [part.mean(0) - x.mean(0) for part in np.split(x, np.cumsum(lengths)[:-1])]
    return sum(n * np.outer(mean, mean) for n, mean in zip(lengths, means, strict=True))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("width", [1, 5, 256, 257, 520])
def test_mean_covariance_second_moment_and_between_scatter_are_those_of_numpy(dtype: torch.dtype, width: int) -> None:
    blocks = 2 if width < 256 else 1
    x = data_of(width, sum(UNEQUAL), blocks, width, dtype)
    moments = Moments(width, blocks=blocks)
    for part, lengths in ((x[:41], UNEQUAL[:2]), (x[41:], UNEQUAL[2:])):
        moments.update(part, lengths)
    tolerance, exact = TOLERANCE[dtype], x.double().numpy()
    for block in range(blocks):
        total, plain = moments.total(block), exact[:, block]
        assert total.count == len(x)
        assert_close(total.mean, plain.mean(0), tolerance)
        assert_close(total.covariance, np.cov(plain.T, bias=True).reshape(width, width), tolerance)
        assert_close(total.second_moment, plain.T @ plain / len(x), tolerance)
        assert_close(moments.between_sequences(block), between_in_numpy(plain, UNEQUAL), tolerance)


def test_one_sequence_is_assumed_where_no_lengths_are_given() -> None:
    x = data_of(0, 50, 1, 3)
    assumed, said = Moments(3), Moments(3)
    assumed.update(x)
    said.update(x, [50])
    assert_same(assumed, said)
    assert assumed.sequences == 1


@settings(repeatable, max_examples=60)
@given(
    st.integers(1, 3),
    st.integers(1, 5),
    st.integers(1, 4),
    st.lists(st.tuples(st.integers(1, 9), st.integers(0, 3), st.integers(0, 9)), min_size=1, max_size=25),
    st.lists(st.tuples(st.integers(0, 99), st.integers(0, 98)), min_size=9, max_size=9),
)
def test_ten_parts_merged_in_any_grouping_are_one_pass(
    blocks: int, width: int, folds: int, sequences: list[tuple[int, int, int]], merges: list[tuple[int, int]]
) -> None:
    x = data_of(len(sequences), sum(length for length, _, _ in sequences), blocks, width)
    parts = [Moments(width, blocks=blocks, folds=folds) for _ in range(10)]  # some of them stay empty
    one_pass = Moments(width, blocks=blocks, folds=folds)
    for vectors, (length, fold, part) in zip(x.split([length for length, _, _ in sequences]), sequences, strict=True):
        for moments in (parts[part], one_pass):
            moments.update(vectors, [length], fold % folds)
    for into, other in merges:
        receiver = parts.pop(into % len(parts))
        receiver.merge(parts.pop(other % len(parts)))
        parts.append(receiver)
    assert_same(parts[0], one_pass, 1e-11)
    assert_close(parts[0].total().covariance, np.cov(x[:, 0].T.numpy(), bias=True).reshape(width, width), 1e-11)


@settings(repeatable, max_examples=30)
@given(st.data())
def test_a_part_is_the_moments_of_the_sliced_data(data: st.DataObject) -> None:
    blocks, width = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 7))
    block, start = data.draw(st.integers(0, blocks - 1)), data.draw(st.integers(0, width - 1))
    stop = data.draw(st.integers(start + 1, width) | st.none())
    x = data_of(width, 30, blocks, width)
    whole, sliced = Moments(width, blocks=blocks, folds=2), Moments((stop or width) - start, folds=2)
    for fold, vectors in enumerate(x.split([18, 12])):
        whole.update(vectors, [len(vectors) - 5, 5], fold)
        sliced.update(vectors[:, block : block + 1, start:stop], [len(vectors) - 5, 5], fold)
    part = whole.part(block, start, stop)
    assert_same(part, sliced)
    assert_close(part.total().covariance, sliced.total().covariance, 1e-12)
    assert part.scatter.untyped_storage().data_ptr() == whole.scatter.untyped_storage().data_ptr()  # no copy


def test_panels_of_a_wide_product_change_nothing() -> None:
    x = data_of(3, 700, 1, 300)
    wide, narrow = Moments(300), Moments(150)
    wide.update(x)
    for columns in (slice(0, 150), slice(150, 300), slice(100, 250)):
        narrow = Moments(150)
        narrow.update(x[..., columns])
        assert_same(wide.part(0, columns.start, columns.stop), narrow)
    assert torch.equal(wide.total().scatter, wide.total().scatter.T)


@pytest.mark.parametrize("drift", [0.0, 100.0], ids=["steady", "drifting"])
def test_a_mean_ten_thousand_times_the_deviation_leaves_the_variance_right_in_float32(drift: float) -> None:
    generator = torch.Generator().manual_seed(0)
    exact = torch.randn(20, 500, 1, 4, generator=generator, dtype=torch.float64) + 1e4
    exact += drift * torch.randn(20, 1, 1, 1, generator=generator, dtype=torch.float64)  # each sequence has its own mean
    moments, rounded = Moments(4), exact.float()
    for sequence in rounded:
        moments.update(sequence)
    variances = moments.total().covariance.diagonal()
    assert_close(variances, rounded.double().flatten(0, 1).var(0, unbiased=False)[0], 1e-6)  # of the float32 input
    assert_close(variances, exact.flatten(0, 1).var(0, unbiased=False)[0], 1e-3)  # of the input before rounding to float32


@pytest.mark.parametrize(("blocks", "folds"), [(1, 1), (3, 4)])
def test_memory_depends_on_the_shape_and_not_on_the_number_of_vectors(blocks: int, folds: int) -> None:
    moments = Moments(6, blocks=blocks, folds=folds)
    for n in (1, 5000):
        moments.update(data_of(0, n, blocks, 6))
        held = [value for value in vars(moments).values() if isinstance(value, torch.Tensor) and value is not moments.count]
        assert sum(tensor.untyped_storage().nbytes() for tensor in held) == Moments.nbytes(6, blocks, folds)


@pytest.mark.parametrize(
    ("vectors", "lengths"),
    [
        (torch.zeros(4, 3), None),  # no block dimension
        (torch.zeros(4, 1, 3), None),  # too few blocks
        (torch.zeros(4, 2, 5), None),  # too wide
        (torch.zeros(4, 2, 3), [3]),  # a vector that belongs to no sequence
        (torch.zeros(4, 2, 3), [4, 1]),  # a sequence that is incomplete
        (torch.zeros(4, 2, 3), [4, 0]),  # a sequence without vectors
        (torch.zeros(0, 2, 3), None),  # no vectors at all
    ],
)
def test_vectors_that_do_not_fit_are_refused_and_leave_the_moments_as_they_were(
    vectors: torch.Tensor, lengths: list[int] | None
) -> None:
    moments, untouched = (Moments(3, blocks=2) for _ in range(2))
    for one in (moments, untouched):
        one.update(data_of(0, 9, 2, 3))
    with pytest.raises(StatisticsError, match=r"expected \[n, 2, 3\]"):
        moments.update(vectors, lengths)
    assert_same(moments, untouched, 0)


@pytest.mark.parametrize("shape", [(4, 2, 2), (3, 1, 2), (3, 2, 1)], ids=["width", "blocks", "folds"])
def test_moments_of_another_shape_are_not_merged(shape: tuple[int, int, int]) -> None:
    width, blocks, folds = shape
    with pytest.raises(StatisticsError, match="different shapes"):
        Moments(3, blocks=2, folds=2).merge(Moments(width, blocks=blocks, folds=folds))


def test_an_empty_part_changes_nothing_and_is_filled_by_a_merge() -> None:
    filled, empty = Moments(3, folds=2), Moments(3, folds=2)
    filled.update(data_of(0, 20, 1, 3), [12, 8], fold=1)
    before = Moments(3, folds=2)
    before.update(data_of(0, 20, 1, 3), [12, 8], fold=1)
    filled.merge(Moments(3, folds=2))
    assert_same(filled, before, 0)
    empty.merge(filled)
    assert_same(empty, before)


def test_the_coarsest_precision_of_all_products_is_kept() -> None:
    fine, coarse = Moments(3), Moments(3)
    assert fine.precision == 0
    fine.update(data_of(0, 20, 1, 3))
    assert fine.precision == torch.finfo(torch.float64).eps
    coarse.update(data_of(0, 20, 1, 3, torch.bfloat16))
    for moments in (coarse, coarse.part(0, 1)):
        assert moments.precision == torch.finfo(torch.float32).eps
    coarse.update(data_of(0, 20, 1, 3))
    fine.merge(coarse)
    assert fine.precision == coarse.precision == torch.finfo(torch.float32).eps


def test_folds_are_combined_on_demand() -> None:
    x = data_of(1, 60, 1, 4)
    moments = Moments(4, folds=4)
    for fold, vectors in ((0, x[:10]), (1, x[10:30]), (3, x[30:])):
        moments.update(vectors, fold=fold)
    for folds, chosen in (([0, 1], x[:30]), ([3], x[30:]), ([2, 1], x[10:30]), (None, x)):
        total = moments.total(folds=folds)
        assert total.count == len(chosen)
        assert_close(total.mean, chosen[:, 0].numpy().mean(0), 1e-12)
        assert_close(total.covariance, np.cov(chosen[:, 0].T.numpy(), bias=True), 1e-12)


@pytest.mark.parametrize("folds", [None, [1], []])
def test_the_total_of_no_vectors_is_refused(folds: list[int] | None) -> None:
    moments = Moments(3, folds=2)
    if folds is not None:
        moments.update(data_of(0, 5, 1, 3), fold=0)
    with pytest.raises(StatisticsError, match="no vectors"):
        moments.total(folds=folds)
