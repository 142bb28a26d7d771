"""A stage: ridge regression as in NumPy, planted relations found, decoded as the decoder does, rows that pay."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from eigencache.codec.eigen.quantizer import LAMBDA
from eigencache.codec.eigen.transform import StagedTransform
from eigencache.fitting.eigen_stage import FittedStage, Halves, basis_of, fit_stage, joined

BEFORE, COLUMNS, N = 12, 20, 4_000
FOREVER = 10**12  # tokens that share the side information: it costs nothing


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def relation() -> Tensor:
    """What the columns of a stage hold of those before [before, columns]."""
    return draw(BEFORE, COLUMNS, seed=1) / BEFORE**0.5


def linear(noise: float, scale: Tensor | float = 1.0, n: int = N) -> tuple[Halves, Halves]:
    """Columns before, of this scale, and columns that are linear in them but for noise; the halves are drawn apart."""
    before = [draw(n, BEFORE, seed=s) for s in (2, 3)]
    columns = [x @ relation() + noise * draw(n, COLUMNS, seed=s) for x, s in zip(before, (4, 5), strict=True)]
    return Halves(*(x * scale for x in before)), Halves(*columns)


def spectral(n: int = N, least: float = 0.01) -> Halves:
    """Columns whose deviations reach from 1 to `least`."""
    turn = torch.linalg.qr(draw(COLUMNS, COLUMNS, seed=8)).Q
    return Halves(*(draw(n, COLUMNS, seed=s) * torch.logspace(0, np.log10(least), COLUMNS) @ turn.mT for s in (6, 7)))


@pytest.mark.parametrize("scale", [1.0, 1e-6, "from 1e-2 to 1e2"])
def test_the_prediction_is_the_ridge_regression_of_numpy_rounded_to_8_bits(scale: float | str) -> None:
    scales = torch.logspace(-2, 2, BEFORE) if isinstance(scale, str) else torch.full((BEFORE,), scale)
    before, columns = linear(0.3, scales)
    prediction = fit_stage(5, columns, None, before, 0.2, FOREVER).stage.prediction
    assert prediction is not None and prediction.codes.dtype == torch.int8
    x, y = before.fitted.double().numpy(), columns.fitted.double().numpy()
    spread = np.sqrt(np.square(x).mean(0))
    np.testing.assert_allclose(prediction.spread, spread, rtol=1e-5)
    x /= spread
    expected = np.linalg.solve(x.T @ x / N + 1e-3 * np.eye(BEFORE), x.T @ y / N)
    found = prediction.weights.double().numpy() * spread[:, None]
    assert (np.abs(found - expected) <= 0.51 * np.abs(expected).max(0) / 127 + 1e-6).all()


def test_a_planted_relation_is_found_and_only_the_noise_is_left() -> None:
    before, columns = linear(0.01)
    fitted = fit_stage(0, columns, None, before, 0.005, FOREVER)
    assert fitted.stage.prediction is not None
    torch.testing.assert_close(fitted.stage.prediction.weights, relation(), rtol=0, atol=0.01)
    rest = columns.apart - before.apart @ fitted.stage.prediction.weights
    assert float(rest.square().mean().sqrt()) < 0.015  # rounding the weights adds a little to the noise of 0.01
    assert float(columns.apart.square().mean().sqrt()) > 0.9


def test_a_column_that_never_varies_predicts_nothing_and_breaks_nothing() -> None:
    before, columns = linear(0.1)
    for half in before:
        half[:, 4] = 0
    fitted = fit_stage(0, columns, None, before, 0.1, FOREVER)
    assert fitted.stage.prediction is not None and bool(fitted.stage.prediction.weights.isfinite().all())
    nothing = Halves(*(torch.zeros_like(half) for half in before))
    alone = fit_stage(0, columns, None, nothing, 0.1, FOREVER)
    assert alone.stage.prediction is not None and not alone.stage.prediction.weights.any()
    torch.testing.assert_close(alone.decoded.apart, fit_stage(0, columns, None, None, 0.1, FOREVER).decoded.apart)


def told(columns: Halves) -> Halves:
    """A prediction that says half of what is there, and something else."""
    return Halves(*(0.5 * half + 0.1 * draw(*half.shape, seed=9) for half in columns))


@pytest.mark.parametrize("kind", ["alone", "told by tokens", "predicted"])
@pytest.mark.parametrize("step", [0.03, 0.3])
def test_integers_and_decoded_columns_are_those_of_encoder_and_decoder(kind: str, step: float) -> None:
    before, columns = linear(0.3)
    if kind == "predicted":
        first = fit_stage(0, before, None, None, step, FOREVER)
        stages = [first, fit_stage(BEFORE, columns, None, first.decoded, step, FOREVER)]
        z = Halves(*(torch.cat(pair, 1) for pair in zip(before, columns, strict=True)))
        expected = Halves(*(torch.cat(pair, 1) for pair in zip(*(s.decoded for s in stages), strict=True)))
        given = Halves(None, None)  # type: ignore[arg-type]
    else:
        given = told(columns) if kind == "told by tokens" else Halves(None, None)  # type: ignore[arg-type]
        stages = [fit_stage(0, columns, None if given.fitted is None else given, None, step, FOREVER)]
        z, expected = columns, stages[0].decoded
    quantizer, _, symbols = joined(stages)
    transform = StagedTransform(torch.zeros(z.fitted.shape[1]), tuple(s.stage for s in stages))
    for vectors, decoded, first_stage in zip(z, expected, given, strict=True):
        integers = transform.quantize(vectors, step, quantizer, first_stage)
        torch.testing.assert_close(transform.dequantize(integers, step, quantizer, first_stage), decoded, rtol=0, atol=1e-4)
    assert torch.equal(transform.quantize(z.apart, step, quantizer, given.apart), symbols)
    error = (expected.apart - z.apart).square().mean()
    assert float(error) < step**2 / 8  # no more than rounding and a dead zone lose


def test_what_tokens_say_is_subtracted_first() -> None:
    columns = spectral()
    exact = fit_stage(0, columns, Halves(*(half - 0.01 * draw(*half.shape) for half in columns)), None, 0.2, FOREVER)
    assert len(exact.stage) == 0 and exact.symbols.shape == (N, 0)
    assert float((exact.decoded.apart - columns.apart).std()) == pytest.approx(0.01, rel=0.05)


def test_basis_and_prediction_are_fitted_on_one_half_and_the_quantizer_on_the_other() -> None:
    before, columns = linear(0.3)
    one = fit_stage(0, columns, None, before, 0.2, FOREVER)
    other = fit_stage(0, columns._replace(apart=3 * columns.apart), None, before, 0.2, FOREVER)
    assert one.stage.prediction is not None and other.stage.prediction is not None
    assert torch.equal(one.stage.prediction.codes, other.stage.prediction.codes)
    basis = basis_of(columns.fitted - before.fitted @ one.stage.prediction.weights).mT
    for fitted in (one, other):
        torch.testing.assert_close(fitted.stage.rows, basis[: len(fitted.stage)], rtol=0, atol=1 / 250)
    assert len(other.stage) >= len(one.stage) and float(other.classes.max()) > float(one.classes.max())
    swapped = fit_stage(0, columns._replace(fitted=columns.fitted.flip(1)), None, before, 0.2, FOREVER)
    assert swapped.stage.prediction is not None
    assert not torch.equal(swapped.stage.prediction.codes, one.stage.prediction.codes)


def test_a_basis_that_is_known_is_used() -> None:
    columns = spectral()
    known = basis_of(columns.fitted)
    one, other = (fit_stage(3, columns, None, None, 0.1, FOREVER, basis) for basis in (None, known))
    assert torch.equal(one.stage.rows, other.stage.rows) and torch.equal(one.symbols, other.symbols)
    assert (one.stage.start, one.stage.stop) == (3, 3 + COLUMNS)
    turned = fit_stage(3, columns, None, None, 0.1, FOREVER, known.flip(1))
    assert not torch.equal(one.stage.rows, turned.stage.rows[: len(one.stage)])


def test_rows_take_16_bits_where_8_would_add_to_the_error() -> None:
    columns = spectral(least=1e-3)
    counts = [len(fit_stage(0, columns, None, None, step, FOREVER).stage.fine) for step in (1.0, 0.1, 0.01, 0.001)]
    deviations = torch.logspace(0, -3, COLUMNS)
    expected = [int((deviations > 8 * step).sum()) for step in (1.0, 0.1, 0.01, 0.001)]
    assert counts == pytest.approx(expected, abs=1) and counts[0] == 0 < counts[1]
    fine = fit_stage(0, columns, None, None, 0.001, FOREVER)
    assert fine.stage.fine.dtype == torch.float16 and fine.stage.coarse.dtype == torch.int8
    error = (fine.decoded.apart - columns.apart).square().mean() / 0.001**2
    assert float(error) < 1.1 / 12  # of the quantizer alone


def test_classes_are_quarters_of_an_octave_of_the_deviation_in_steps_and_shared_by_stages() -> None:
    step = 0.02
    stages = [fit_stage(0, columns, None, None, step, FOREVER) for columns in (spectral(), spectral(least=0.1))]
    for fitted, columns in zip(stages, (spectral(), spectral(least=0.1)), strict=True):
        y = columns.apart @ basis_of(columns.fitted) / step
        expected = (4 * y.square().mean(0).sqrt().log2().clamp_min(-4)).round()
        torch.testing.assert_close(fitted.classes, expected[: len(fitted.stage)])
    quantizer, table_of, symbols = joined(stages)
    classes = torch.cat([s.classes for s in stages])
    assert torch.equal(table_of.unique(), torch.arange(len(classes.unique())))
    assert all(len(classes[table_of == t].unique()) == 1 for t in table_of.unique())
    assert len(table_of.unique()) < sum(len(s.classes.unique()) for s in stages)
    assert symbols.shape == (N, len(table_of)) == (N, len(quantizer.dead_zone))


def cost(fitted: FittedStage, columns: Halves, tokens: float, step: float) -> float:
    """Bits of a token, distortion at the exchange rate of the quantizer, and the share of the side information."""
    bits = 0.0
    for column in fitted.symbols.T:
        share = column.unique(return_counts=True)[1] / len(column)
        bits -= float((share * share.log2()).sum())
    lost = float((fitted.decoded.apart - columns.apart).square().sum(1).mean()) / step**2 / LAMBDA
    return bits + lost + len(fitted.stage) * (8 * COLUMNS + 160) / tokens


def test_rows_that_cost_more_than_they_save_over_so_many_tokens_are_left_out() -> None:
    columns, step = spectral(), 0.05
    fits = {tokens: fit_stage(0, columns, None, None, step, tokens) for tokens in (30, 100, 300, 1_000, 10**4, 10**9)}
    counts = [len(fitted.stage) for fitted in fits.values()]
    assert counts == sorted(counts) and 0 < counts[0] < counts[-1] - 4
    for tokens, fitted in fits.items():  # nothing that was fitted for another number is cheaper
        costs = {other: cost(one, columns, tokens, step) for other, one in fits.items()}
        assert costs[tokens] < 1.005 * min(costs.values()), costs
        rows = fits[10**9].stage.rows[: len(fitted.stage)]  # the widest stay
        torch.testing.assert_close(fitted.stage.rows, rows, rtol=0, atol=1 / 250)


@pytest.mark.parametrize("of", [torch.zeros_like, lambda x: 1e-3 * x])
def test_a_stage_may_hold_nothing_that_is_worth_a_bit(of: Callable[[Tensor], Tensor]) -> None:
    empty = Halves(*map(of, spectral()))
    fitted = fit_stage(0, empty, None, None, 1.0, FOREVER)
    assert len(fitted.stage) == 0 and not fitted.decoded.apart.any() and fitted.symbols.shape == (N, 0)
    after = fit_stage(COLUMNS, spectral(), None, fitted.decoded, 0.1, FOREVER)
    quantizer, table_of, symbols = joined([fitted, after])
    assert len(table_of) == len(quantizer.rest) == len(after.stage) > 0 and torch.equal(symbols, after.symbols)
