"""Columns, metrics and bases of `eigen` against NumPy in float64, from covariances and Gram matrices, in every scope."""

import numpy as np
import pytest
import torch
from torch import Tensor

from eigencache.calibration.vectors import SampledVectors
from eigencache.codec.eigen.transform import Stage
from eigencache.codec.layout import Layout, Part
from eigencache.errors import StatisticsError
from eigencache.fitting.eigen_basis import scaled_metrics, spans_of, stored_inverses
from eigencache.fitting.eigen_stage import basis_of
from eigencache.fitting.weighed_vectors import WeighedVectors
from eigencache.spectral.metric import inverted

LAYOUT = Layout(tuple(Part(i, slot, (0, 2), (6, 4)[slot]) for i in range(2) for slot in (0, 1)), {})  # widths 12 8 12 8
WIDTH = LAYOUT.width
SCOPES = {
    "joint": [(0, 40)],
    "groups": [(0, 20), (20, 40)],
    "layer": [(0, 12), (12, 20), (20, 32), (32, 40)],
    "head": [(0, 6), (6, 12), (12, 16), (16, 20), (20, 26), (26, 32), (32, 36), (36, 40)],
}


def vectors(n: int, seed: int = 0, smallest: float = 0.05) -> Tensor:
    """Centered, of a known covariance turned at random."""
    rng = np.random.default_rng(seed)
    turn = np.linalg.qr(np.random.default_rng(9).normal(size=(WIDTH, WIDTH)))[0]
    x = rng.normal(size=(n, WIDTH)) * np.geomspace(3, smallest, WIDTH) @ turn.T
    return torch.from_numpy(x - x.mean(0)).float()


def metrics(seed: int = 0) -> list[Tensor]:
    rng = np.random.default_rng(seed)

    def block(dim: int) -> np.ndarray:
        a = rng.normal(size=(dim, 3 * dim)) * 10 ** rng.uniform(-1, 1)
        return a @ a.T

    return [torch.from_numpy(np.stack([block(part.dim) for _ in range(2)])) for part in LAYOUT.parts]


def weighed(x: Tensor, roots: tuple[Tensor, ...]) -> WeighedVectors:
    samples = SampledVectors(LAYOUT, x, torch.zeros(len(x), dtype=torch.int64), (len(x),))
    return WeighedVectors(samples, 0, torch.zeros(WIDTH), roots)


def power(matrix: np.ndarray, exponent: float) -> np.ndarray:
    values, basis = np.linalg.eigh(matrix)
    return (basis * values**exponent) @ basis.T


def whole(blocks) -> np.ndarray:
    """The block-diagonal matrix of [heads, dim, dim] per part."""
    matrix, at = np.zeros((WIDTH, WIDTH)), 0
    for block in (np.asarray(b, dtype=np.float64) for part in blocks for b in part):
        matrix[at : at + len(block), at : at + len(block)] = block
        at += len(block)
    return matrix


def tempered(alpha: float) -> np.ndarray:
    """M^α, regularized and scaled as the docstring says, written once more."""
    blocks = [b.numpy() for b in metrics()]
    diagonal = np.concatenate([np.diagonal(b, axis1=1, axis2=2).ravel() for b in blocks]).mean()
    made = []
    for part in blocks:
        usable = [(b + 1e-6 * diagonal * np.eye(len(b))) / diagonal for b in part]
        made.append([power(b + 1e-3 * np.trace(b) / len(b) * np.eye(len(b)), alpha) for b in usable])
    return whole(made)


# Columns


@pytest.mark.parametrize("scope", SCOPES)
def test_spans_are_heads_slots_of_layers_groups_of_layers_or_all(scope: str) -> None:
    assert spans_of(LAYOUT, scope, 1) == SCOPES[scope]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("group", "stops"),
    [(1, [3, 8, 15, 24, 35]), (2, [8, 24, 35]), (3, [15, 35]), (4, [24, 35]), (5, [35]), (6, [35]), (99, [35])],
)
def test_groups_are_consecutive_layers_of_any_width_and_number_and_the_last_may_be_smaller(
    group: int, stops: list[int]
) -> None:
    layers = (0, 2, 3, 7, 8)  # a model may cache nothing in some
    layout = Layout(tuple(Part(i, slot, (0, 1), (1, 2 + 2 * k)[slot]) for k, i in enumerate(layers) for slot in (0, 1)), {})
    assert spans_of(layout, "groups", group) == list(zip([0, *stops], stops, strict=False))
    assert (spans_of(layout, "groups", group) == spans_of(layout, "joint", group)) is (group >= len(layers))


# Metrics


def test_metrics_come_scaled_to_a_mean_of_one_on_their_diagonal_and_as_roots_of_each_other() -> None:
    root, inverse = scaled_metrics(metrics(), 1.0)
    assert {m.dtype for m in (*root, *inverse)} == {torch.float32}
    full = whole(root) @ whole(root)
    assert np.diagonal(full).mean() == pytest.approx(1, rel=2e-3)  # and what regularizing adds
    np.testing.assert_allclose(whole(root) @ whole(inverse), np.eye(WIDTH), atol=1e-4)
    again = whole(scaled_metrics([m * 1e-12 for m in metrics()], 1.0)[0])
    np.testing.assert_allclose(again, whole(root), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("alpha", [1.0, 0.75, 0.0])
def test_tempered_metrics_are_powers(alpha: float) -> None:
    root = whole(scaled_metrics(metrics(), alpha)[0])
    np.testing.assert_allclose(root @ root, tempered(alpha), rtol=1e-3, atol=1e-4)


def test_no_metrics_are_frobenius_and_a_head_that_nothing_reads_keeps_a_floor() -> None:
    assert scaled_metrics([], 0.75) == ((), ())
    unread = metrics()
    unread[2][1] = 0
    root, inverse = scaled_metrics(unread, 1.0)
    assert float(root[2][1].diagonal().min()) > 0 and bool(inverse[2].isfinite().all())
    with pytest.raises(StatisticsError, match="the metric has a trace of"):
        scaled_metrics([m * torch.nan for m in metrics()], 1.0)


@pytest.mark.parametrize("alpha", [1.0, 0.75])
def test_the_metric_of_a_head_with_dead_dimensions_is_that_of_its_live_ones(alpha: float) -> None:
    live = [torch.ones(m.shape[:2], dtype=torch.bool) for m in metrics()]
    live[0][1, [0, 2]] = False
    live[-1][0] = False  # a head that never varies
    root, inverse = scaled_metrics(metrics(), alpha, live)
    diagonal = np.concatenate([np.diagonal(m.numpy(), axis1=1, axis2=2).ravel() for m in metrics()]).mean()
    for blocks, dead, r, i in zip(metrics(), (~m for m in live), root, inverse, strict=True):
        for block, off, one, back in zip(blocks, dead, r, i, strict=True):
            assert not one[off].any() and not one[:, off].any() and not back[off].any() and not back[:, off].any()
            on = (~off).nonzero().flatten()
            if len(on):
                part = (block[on][:, on].numpy() + 1e-6 * diagonal * np.eye(len(on))) / diagonal
                expected = power(part + 1e-3 * np.trace(part) / len(on) * np.eye(len(on)), alpha / 2)
                np.testing.assert_allclose(one[on][:, on], expected, rtol=1e-4, atol=1e-5)
                np.testing.assert_allclose(one[on][:, on] @ back[on][:, on], np.eye(len(on)), atol=1e-4)
    for stored, again in ((stored_inverses(inverse), root), (inverse, root)):
        for blocks, given in zip(inverted(stored), again, strict=True):
            assert torch.equal(blocks == 0, given == 0) or not given.any()
            torch.testing.assert_close(blocks, given, rtol=0.02, atol=0.02)


def conditioned(least: float, largest: float, seed: int = 0) -> Tensor:
    """A symmetric block whose singular values reach from `least` to `largest`."""
    turn = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)).Q
    return (turn * torch.logspace(np.log10(least), np.log10(largest), 6, dtype=torch.float64)) @ turn.mT


@pytest.mark.parametrize(
    ("least", "largest", "half"),
    [(0.1, 10, True), (0.05, 20, True), (0.05, 30, False), (0.9e-3, 0.1, False), (50, 1100, False), (2e-3, 0.9, True)],
)
def test_inverses_are_stored_in_16_bits_only_where_every_block_is_well_conditioned(
    least: float, largest: float, half: bool
) -> None:
    easy, hard = conditioned(0.5, 2), conditioned(least, largest, 1)
    blocks = (torch.stack([easy, easy]), torch.stack([easy, hard]))
    stored = stored_inverses([b.float() for b in blocks])
    assert {b.dtype for b in stored} == {torch.float16 if half else torch.float32}
    for given, kept, root in zip(blocks, stored, inverted(stored), strict=True):
        assert root.dtype == torch.float32 and kept.shape == given.shape
        product = kept.double() @ root.double()
        assert float((product - torch.eye(6)).abs().max()) < 1e-3  # the encoder uses the inverse of what is stored
        error = torch.linalg.matrix_norm(root.double() @ given - torch.eye(6), 2)
        assert float(error.max()) < (0.3 if half else 1e-4)  # condition · 2⁻¹¹ at most


def test_no_blocks_are_stored_as_none() -> None:
    assert stored_inverses([]) == inverted([]) == ()


# Bases


@pytest.mark.parametrize("alpha", [None, 1.0, 0.5])
@pytest.mark.parametrize("scope", SCOPES)
def test_coefficients_and_their_variances_are_those_of_numpy_in_float64(scope: str, alpha: float | None) -> None:
    x = vectors(500)
    z = weighed(x, scaled_metrics([] if alpha is None else metrics(), alpha or 1.0)[0])
    half = power(np.eye(WIDTH) if alpha is None else tempered(alpha), 0.5)
    expected_z = x.double().numpy() @ half
    for start, stop in spans_of(LAYOUT, scope, 1):  # type: ignore[arg-type]
        columns = z.columns(start, stop)
        basis = basis_of(columns)
        values, u = np.linalg.eigh(np.cov(expected_z[:, start:stop].T, bias=True))
        y, expected = (columns @ basis).double().numpy(), expected_z[:, start:stop] @ u[:, ::-1]
        np.testing.assert_allclose(np.square(y).mean(0), values[::-1], rtol=1e-3, atol=1e-6)
        error = np.abs(y * np.sign((y * expected).sum(0)) - expected).max() / expected.std(0).max()
        assert error < 3e-3
        np.testing.assert_allclose(basis.mT @ basis, np.eye(stop - start), atol=1e-5)


@pytest.mark.parametrize("is_weighed", [True, False])
@pytest.mark.parametrize("scope", ["joint", "groups", "layer"])
def test_fewer_vectors_than_numbers_give_the_basis_of_their_covariance(scope: str, is_weighed: bool) -> None:
    x = vectors(11)  # more than the narrower slots have numbers, fewer than the wider
    z = weighed(x, scaled_metrics(metrics() if is_weighed else [], 1.0)[0])
    half = power(tempered(1.0), 0.5) if is_weighed else np.eye(WIDTH)
    for span in spans_of(LAYOUT, scope, 1):  # type: ignore[arg-type]
        columns, expected = z.columns(*span), (x.double().numpy() @ half)[:, slice(*span)]
        basis = basis_of(columns)
        values, u = np.linalg.eigh(np.cov(expected.T, bias=True))
        kept = min(10, span[1] - span[0])  # centered: one less than there are vectors
        assert kept <= basis.shape[1] <= 11
        y = (columns @ basis).double().numpy()
        np.testing.assert_allclose(np.square(y).mean(0)[:kept], values[::-1][:kept], rtol=1e-3, atol=1e-6 * values[-1])
        assert not (np.square(y).mean(0)[kept:] > 1e-6 * values[-1]).any()
        expected = expected @ u[:, ::-1][:, :kept]
        np.testing.assert_allclose(np.abs(y[:, :kept]), np.abs(expected), atol=3e-3 * np.abs(expected).max())
        np.testing.assert_allclose(basis.mT @ basis, np.eye(basis.shape[1]), atol=1e-4)


def test_directions_that_hold_nothing_are_left_out() -> None:
    of_nine_numbers, of_five_vectors = vectors(400) * (torch.arange(WIDTH) < 9), torch.zeros(20, WIDTH)
    of_five_vectors[:5] = vectors(5) + 1
    for x, directions in ((of_nine_numbers, 9), (of_five_vectors, 5)):  # by covariance and by Gram matrix
        assert basis_of(x).shape == (WIDTH, directions)
    assert basis_of(torch.zeros(100, WIDTH)).shape == (WIDTH, 0)


def test_planted_variances_are_recovered() -> None:
    x = vectors(20_000)
    np.testing.assert_allclose((x @ basis_of(x)).square().mean(0), np.geomspace(3, 0.05, WIDTH) ** 2, rtol=0.06)


def test_one_step_for_all_coefficients_is_reverse_water_filling() -> None:
    x, step = vectors(20_000), 0.3
    stage = Stage.of(0, basis_of(x).mT, fine=20)
    y = x @ stage.encoder / step
    variances, active = y.square().mean(0), y.square().mean(0) > 1
    decoded = y.round() * step @ stage.rows
    distortion = (decoded @ stage.encoder / step - y).square().mean(0)
    np.testing.assert_allclose(distortion[active], 1 / 12, rtol=0.05)
    assert float((decoded - x).square().sum(1).mean()) == pytest.approx(float(distortion.sum()) * step**2, rel=1e-2)
    bits = sum(_entropy(column) for column in y.round().T[active])
    water = sum(0.5 * np.log2(12 * v) for v in variances[active].tolist())
    assert bits == pytest.approx(water + 0.254 * int(active.sum()), rel=0.02)  # a quarter of a bit above the bound


def _entropy(column: Tensor) -> float:
    share = column.unique(return_counts=True)[1] / len(column)
    return float(-(share * share.log2()).sum())
