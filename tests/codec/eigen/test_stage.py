"""The stages of `eigen`: rounding to 8 and 16 bits, the encoder of rounded rows, and predictions, against NumPy."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from eigen_chain import float64, rows_of, weights_of
from eigencache.codec.eigen.transform import Prediction, Stage, to_int8
from eigencache.errors import CodecError

COLUMNS = 24


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def orthonormal(rows: int, seed: int = 0) -> Tensor:
    return torch.linalg.qr(draw(COLUMNS, COLUMNS, seed=seed)).Q.mT[:rows]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 6), st.integers(1, 9), st.integers(-30, 30), st.integers(0, 99))
def test_a_row_in_8_bits_is_off_by_half_a_unit_at_most(n: int, m: int, exponent: int, seed: int) -> None:
    rows = draw(n, m, seed=seed) * 10.0**exponent * torch.logspace(0, 4, n, dtype=torch.float64)[:, None]
    codes, scale = to_int8(rows)
    assert codes.dtype == torch.int8 and scale.dtype == torch.float32 and scale.shape == (n,)
    assert all(int(row.abs().max()) == 127 for row in codes.int())
    error = (codes.double() * scale.double()[:, None] - rows).abs()
    assert bool((error <= 0.5001 * scale.double()[:, None]).all())


def test_rows_of_zeros_have_a_scale_and_stay_zeros() -> None:
    codes, scale = to_int8(torch.zeros(3, 4))
    assert not codes.any() and bool((scale >= torch.finfo(torch.float32).tiny).all())
    for fine in (0, 1, 3):
        assert torch.equal(Stage.of(0, torch.zeros(3, 4), fine).rows, torch.zeros(3, 4))
    assert torch.equal(Prediction.of(torch.zeros(4, 3), torch.ones(4)).weights, torch.zeros(4, 3))


@pytest.mark.parametrize("size", [1e-30, 1e-6, 1.0, 1e6, 1e30])
@pytest.mark.parametrize("fine", [0, 2, 5])
def test_first_rows_of_any_size_are_in_float16_and_the_others_in_8_bits(fine: int, size: float) -> None:
    rows = draw(5, 40) * size * torch.tensor([1, 10, 100, 1e3, 1e4])[:, None]
    stage = Stage.of(3, rows, fine)
    assert (stage.start, stage.stop, len(stage)) == (3, 43, 5)
    assert (stage.fine.dtype, stage.fine.shape) == (torch.float16, (fine, 40))
    assert (stage.coarse.dtype, stage.coarse.shape) == (torch.int8, (5 - fine, 40))
    assert stage.scale.dtype == stage.rows.dtype == torch.float32
    assert all(float(row.abs().max()) == 1 for row in stage.fine)
    largest = rows.abs().amax(1, True)
    bound = largest / 127 * 0.5001
    bound = torch.where(torch.arange(5)[:, None] < fine, rows.abs() * 2**-11 * 1.01 + largest * 2**-24, bound)
    error = (stage.rows.double() - rows).abs()
    assert bool((error <= bound).all()) and bool((error.amax(1) > 0).all())
    np.testing.assert_allclose(stage.rows.numpy(), rows_of(stage), rtol=1e-6)


@pytest.mark.parametrize("count", [1, 9, COLUMNS])
@pytest.mark.parametrize("fine", [0, 1, 9])
def test_rounding_of_the_rows_is_solved_for_and_not_ignored(fine: int, count: int) -> None:
    exact, z = orthonormal(count), 100 * draw(500, COLUMNS, seed=1)
    stage = Stage.of(0, exact, min(fine, count))
    stored = rows_of(stage)
    y = (z.float() @ stage.encoder).double().numpy()
    best = np.linalg.lstsq(stored.T, z.numpy().T, rcond=None)[0].T
    np.testing.assert_allclose(y, best, atol=2e-6 * np.abs(best).max())

    def cost(y: np.ndarray) -> float:
        return float(np.square(z.numpy() - y @ stored).sum())

    ignored, least = cost(z.numpy() @ exact.numpy().T), cost(best)
    assert cost(y) - least < 1e-3 * (ignored - least)
    assert ignored - least > 1e-9 * np.square(z.numpy()).sum()


@pytest.mark.parametrize("fine", [0, 9])
def test_what_the_rows_leave_is_orthogonal_to_them(fine: int) -> None:
    stage, z = Stage.of(0, orthonormal(9), fine), draw(500, COLUMNS, seed=1)
    left = z - (z.float() @ stage.encoder).double() @ torch.from_numpy(rows_of(stage))
    assert float((left @ stage.rows.double().mT).abs().max()) < 1e-5
    transposed = z @ stage.rows.double().mT  # the encoder of rows that are orthonormal
    assert float(left.square().sum()) < float((z - transposed @ stage.rows.double()).square().sum())


def test_rows_that_are_no_basis_of_length_one_are_solved_for_too() -> None:
    rows = orthonormal(6) * torch.logspace(0, 2, 6, dtype=torch.float64)[:, None] / 10
    stage, y = Stage.of(0, rows + 0.2 * rows.roll(1, 1), 6), draw(50, 6, seed=2)
    z = y @ torch.from_numpy(rows_of(stage))
    torch.testing.assert_close((z.float() @ stage.encoder).double(), y, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("fine", [0, 1, 3])
def test_rows_that_depend_on_each_other_are_refused_by_the_encoder_alone(fine: int) -> None:
    rows, axes = orthonormal(2), torch.eye(2, COLUMNS)
    for harmed in (rows[[0, 1, 1]], torch.cat([axes, axes.sum(0, keepdim=True)]), torch.cat([rows, 0 * rows[:1]])):
        stage = Stage.of(7, harmed, fine)
        assert stage.rows.isfinite().all()
        with pytest.raises(
            CodecError, match="the basis of columns 7 to 31 has linearly dependent rows: fit the codec again"
        ):
            _ = stage.encoder


def test_a_stage_may_have_no_rows() -> None:
    stage = Stage.of(2, torch.zeros(0, 5))
    assert len(stage) == 0 and stage.rows.shape == (0, 5) and stage.encoder.shape == (5, 0)
    assert torch.equal(draw(3, 5).float() @ stage.encoder @ stage.rows, torch.zeros(3, 5))


def test_weights_are_those_that_were_rounded_of_columns_divided_by_their_spread() -> None:
    spread = torch.logspace(-3, 3, 7, dtype=torch.float64)
    scaled = draw(7, 5) * torch.logspace(0, 4, 5, dtype=torch.float64)
    one = Prediction.of(scaled, spread)
    assert (one.codes.dtype, one.codes.shape) == (torch.int8, (5, 7))
    assert (one.scale.dtype, one.spread.dtype, one.weights.dtype) == (torch.float32,) * 3
    assert all(int(row.abs().max()) == 127 for row in one.codes.int())  # a scale for every column that is predicted
    wanted = scaled / spread[:, None]
    assert one.weights.shape == wanted.shape == (7, 5) and one.weights.is_contiguous()
    bound = 0.5001 * scaled.abs().amax(0) / 127 / spread[:, None]
    assert bool(((one.weights.double() - wanted).abs() <= bound).all())
    np.testing.assert_allclose(one.weights.numpy(), weights_of(one), rtol=1e-6)


def test_weights_that_fit_8_bits_are_exact() -> None:
    codes = torch.randint(-127, 128, (6, 4), generator=torch.Generator().manual_seed(0)).double()
    codes[0] = 127
    spread = 2.0 ** torch.arange(-3, 3, dtype=torch.float64)
    one = Prediction.of(codes / 16, spread)
    assert torch.equal(one.weights.double(), codes / 16 / spread[:, None])


def test_nothing_is_expected_without_a_prediction_or_a_stage_before() -> None:
    one = Prediction.of(draw(4, 5), torch.ones(4))
    before = draw(2, 3, 4, seed=1).float()
    alone, predicted = Stage.of(4, draw(2, 5, seed=2)), Stage.of(4, draw(2, 5, seed=2), prediction=one)
    assert alone.expected(before) == alone.expected(None) == predicted.expected(None) == 0.0
    found = predicted.expected(before)
    assert isinstance(found, Tensor)
    np.testing.assert_allclose(found.numpy(), float64(before) @ weights_of(one), rtol=1e-5, atol=1e-5)


def test_what_is_held_is_rows_scales_and_prediction_in_the_order_of_memory() -> None:
    one = Prediction.of(draw(4, 5), torch.ones(4))
    stage = Stage.of(4, draw(5, 3).mT, 1, one)
    expected = (stage.fine, stage.coarse, stage.scale, one.codes, one.scale, one.spread)
    for held in (tuple(stage.tensors()), tuple(stage.to("cpu").tensors())):
        assert all(torch.equal(a, b) for a, b in zip(held, expected, strict=True))
        assert all(x.is_contiguous() for x in held)
    assert sum(x.nbytes for x in stage.tensors()) == 2 * 5 + 2 * 5 + 4 * 3 + 4 * 5 + 4 * 5 + 4 * 4
    turned = Stage(4, 9, stage.fine, stage.coarse.mT.contiguous().mT, stage.scale)
    assert turned.coarse.is_contiguous()
    assert stage.to("cpu").prediction is not None and Stage.of(4, draw(3, 5)).to("cpu").prediction is None
