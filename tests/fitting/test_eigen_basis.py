"""The basis of `eigen` against NumPy in float64, from covariances and from Gram matrices, in every scope."""

import numpy as np
import pytest
import torch
from torch import Tensor

from eigencache.codec.eigen.transform import JointTransform
from eigencache.codec.layout import Layout, Part
from eigencache.errors import StatisticsError
from eigencache.fitting.eigen_basis import basis_of, scaled_metrics, spans_of

LAYOUT = Layout(tuple(Part(i, slot, (0, 2), (6, 4)[slot]) for slot in (0, 1) for i in range(2)), {})  # widths 12 12 8 8
WIDTH = LAYOUT.width
SCOPES = {
    "joint": [(0, 40)],
    "kind": [(0, 24), (24, 40)],
    "layer": [(0, 12), (12, 24), (24, 32), (32, 40)],
    "head": [(0, 6), (6, 12), (12, 18), (18, 24), (24, 28), (28, 32), (32, 36), (36, 40)],
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


@pytest.mark.parametrize("scope", SCOPES)
def test_spans_are_heads_layers_kinds_or_all(scope: str) -> None:
    assert spans_of(LAYOUT, scope) == SCOPES[scope]  # type: ignore[arg-type]


def test_metrics_come_scaled_to_a_mean_of_one_on_their_diagonal_and_as_roots_of_each_other() -> None:
    full, root, inverse = scaled_metrics(metrics(), 1.0)
    assert {m.dtype for m in (*full, *root, *inverse)} == {torch.float32}
    assert np.diagonal(whole(full)).mean() == pytest.approx(1, rel=2e-3)  # and what regularizing adds
    np.testing.assert_allclose(whole(root) @ whole(inverse), np.eye(WIDTH), atol=1e-4)
    np.testing.assert_allclose(whole(root) @ whole(root), whole(full), atol=1e-4)
    again = scaled_metrics([m * 1e-12 for m in metrics()], 1.0)[0]
    np.testing.assert_allclose(whole(again), whole(full), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("alpha", [1.0, 0.75, 0.0])
def test_tempered_metrics_are_powers(alpha: float) -> None:
    np.testing.assert_allclose(whole(scaled_metrics(metrics(), alpha)[0]), tempered(alpha), rtol=1e-3, atol=1e-4)


def test_no_metrics_are_frobenius_and_a_head_that_nothing_reads_keeps_a_floor() -> None:
    assert scaled_metrics([], 0.75) == ((), (), ())
    unread = metrics()
    unread[2][1] = 0
    full, _, inverse = scaled_metrics(unread, 1.0)
    assert float(full[2][1].diagonal().min()) > 0 and bool(inverse[2].isfinite().all())
    with pytest.raises(StatisticsError, match="the metric has a trace of"):
        scaled_metrics([m * torch.nan for m in metrics()], 1.0)


@pytest.mark.parametrize("alpha", [None, 1.0, 0.5])
@pytest.mark.parametrize("scope", SCOPES)
def test_coefficients_and_eigenvalues_are_those_of_numpy_in_float64(scope: str, alpha: float | None) -> None:
    x = vectors(500)
    full, root, inverse = scaled_metrics([] if alpha is None else metrics(), alpha or 1.0)
    metric = np.eye(WIDTH) if alpha is None else tempered(alpha)
    found = [basis_of(x, *span, root, inverse) for span in spans_of(LAYOUT, scope)]  # type: ignore[arg-type]
    transform = JointTransform(torch.zeros(WIDTH), tuple(basis for basis, _ in found), full)
    half = power(metric, 0.5)
    covariance = half @ np.cov(x.double().numpy().T, bias=True) @ half
    expected, spectrum = [], []
    for a, b in SCOPES[scope]:
        values, u = np.linalg.eigh(covariance[a:b, a:b])
        expected.append((x.double().numpy() @ half)[:, a:b] @ u[:, ::-1])
        spectrum.append(values[::-1])
    np.testing.assert_allclose(torch.cat([values for _, values in found]), np.concatenate(spectrum), rtol=1e-3, atol=1e-6)
    y, expected = transform.encode(x, 1.0).double().numpy(), np.concatenate(expected, 1)
    y *= np.sign((y * expected).sum(0))
    error = np.sqrt(np.square(y - expected).mean(0) / np.square(expected).mean(0).max())
    assert error.max() < 3e-3


@pytest.mark.parametrize("weighed", [True, False])
@pytest.mark.parametrize("scope", ["joint", "kind", "layer"])
def test_fewer_vectors_than_numbers_give_the_basis_of_their_covariance(scope: str, weighed: bool) -> None:
    x = vectors(11)  # more than the narrower layers have numbers, fewer than the wider
    full, root, inverse = scaled_metrics(metrics() if weighed else [], 1.0)
    half = power(tempered(1.0), 0.5) if weighed else np.eye(WIDTH)
    weighed_x = x.double().numpy() @ half
    for span in spans_of(LAYOUT, scope):  # type: ignore[arg-type]
        basis, eigenvalues = basis_of(x, *span, root, inverse)
        values, u = np.linalg.eigh(np.cov(weighed_x[:, slice(*span)].T, bias=True))
        kept = min(10, span[1] - span[0])  # centered: one less than there are vectors
        assert kept <= len(eigenvalues) == len(basis.rows) <= 11
        np.testing.assert_allclose(eigenvalues[:kept], values[::-1][:kept], rtol=1e-4, atol=1e-6 * values[-1])
        assert not (eigenvalues[kept:] > 1e-6 * eigenvalues[0]).any()
        y = JointTransform(torch.zeros(WIDTH), (basis,), full).encode(x, 1.0).double().numpy()[:, :kept]
        expected = weighed_x[:, slice(*span)] @ u[:, ::-1][:, :kept]
        np.testing.assert_allclose(np.abs(y), np.abs(expected), atol=3e-3 * np.abs(expected).max())
        d, metric = basis.decoder(1.0).double().numpy(), (half @ half)[slice(*span), slice(*span)]
        np.testing.assert_allclose(d @ metric @ d.T, np.eye(len(d)), atol=2e-2)  # orthonormal, rounding too


def test_directions_that_hold_nothing_are_left_out() -> None:
    of_nine_numbers, of_five_vectors = vectors(400) * (torch.arange(WIDTH) < 9), torch.zeros(20, WIDTH)
    of_five_vectors[:5] = vectors(5) + 1
    for x, directions in ((of_nine_numbers, 9), (of_five_vectors, 5)):  # by covariance and by Gram matrix
        basis, eigenvalues = basis_of(x, 0, WIDTH, (), ())
        assert len(eigenvalues) == len(basis.rows) == directions


def test_planted_eigenvalues_are_recovered() -> None:
    eigenvalues = basis_of(vectors(20_000), 0, WIDTH, (), ())[1]
    np.testing.assert_allclose(eigenvalues, np.geomspace(3, 0.05, WIDTH) ** 2, rtol=0.06)


def test_one_step_for_all_coefficients_is_reverse_water_filling() -> None:
    x = vectors(20_000)
    basis, eigenvalues = basis_of(x, 0, WIDTH, (), ())
    transform = JointTransform(torch.zeros(WIDTH), (basis,))
    step = 0.3
    y = transform.encode(x, step)
    decoded = transform.decode(y.round(), step)
    active = eigenvalues > step**2
    distortion = (transform.encode(decoded, step) - y).square().mean(0) * step**2
    np.testing.assert_allclose(distortion[active], step**2 / 12, rtol=0.05)
    assert float((decoded - x).square().sum(1).mean()) == pytest.approx(float(distortion.sum()), rel=1e-2)
    bits = sum(_entropy(column) for column in y.round().T[active])
    water = sum(0.5 * np.log2(v / (step**2 / 12)) for v in eigenvalues[active].tolist())
    assert bits == pytest.approx(water + 0.254 * int(active.sum()), rel=0.02)  # a quarter of a bit above the bound


def _entropy(column: Tensor) -> float:
    share = column.unique(return_counts=True)[1] / len(column)
    return float(-(share * share.log2()).sum())
