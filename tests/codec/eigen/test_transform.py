"""The transform of `eigen` against NumPy in float64: its coefficients, their cost, and what is lost with some of them."""

import numpy as np
import pytest
import torch
from torch import Tensor

from eigencache.codec.eigen.transform import Basis, JointTransform
from eigencache.errors import CodecError
from eigencache.spectral.metric import block_product

HEADS, DIM = (2, 1, 3), (6, 10, 4)  # of three parts
WIDTH = sum(h * d for h, d in zip(HEADS, DIM, strict=True))


def vectors(n: int = 600, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, WIDTH)) * np.geomspace(30, 0.1, WIDTH) @ np.linalg.qr(rng.normal(size=(WIDTH, WIDTH)))[0] + 5


def blocks(seed: int = 0) -> list[np.ndarray]:
    """Metrics [heads, dim, dim] of every part, condition about 100, scales apart by another 100."""
    rng = np.random.default_rng(seed)

    def one(dim: int) -> np.ndarray:
        turn = np.linalg.qr(rng.normal(size=(dim, dim)))[0]
        return (turn * np.geomspace(1, 0.01, dim)) @ turn.T * 10 ** rng.uniform(-1, 1)

    return [np.stack([one(d) for _ in range(h)]) for h, d in zip(HEADS, DIM, strict=True)]


def block_diagonal(metrics: list[np.ndarray]) -> np.ndarray:
    whole, at = np.zeros((WIDTH, WIDTH)), 0
    for block in (b for part in metrics for b in part):
        whole[at : at + len(block), at : at + len(block)] = block
        at += len(block)
    return whole


def power(matrix: np.ndarray, exponent: float) -> np.ndarray:
    values, basis = np.linalg.eigh(matrix)
    return (basis * values**exponent) @ basis.T


def planted(spans: list[tuple[int, int]], weighed: bool = True) -> tuple[JointTransform, np.ndarray, np.ndarray, np.ndarray]:
    """A transform made in float64, with Uᵀ M^{1/2}, Λ and M."""
    x = vectors()
    metric = block_diagonal(blocks()) if weighed else np.eye(WIDTH)
    root, inverse = power(metric, 0.5), power(metric, -0.5)
    covariance = root @ np.cov(x.T, bias=True) @ root
    bases, encoder, spectrum = [], np.zeros((0, WIDTH)), []
    for a, b in spans:
        values, u = np.linalg.eigh(covariance[a:b, a:b])
        decoder = np.zeros((b - a, WIDTH))
        decoder[:, a:b] = u.T[::-1]
        bases.append(Basis.of(a, torch.from_numpy((decoder @ inverse)[:, a:b])))
        encoder = np.concatenate([encoder, decoder @ root])
        spectrum.append(values[::-1])
    metrics = tuple(torch.from_numpy(m).float() for m in blocks()) if weighed else ()
    mean = torch.from_numpy(x.mean(0)).float()
    return JointTransform(mean, tuple(bases), metrics), encoder, np.concatenate(spectrum), metric


SPANS = {
    "joint": [(0, WIDTH)],
    "layer": [(0, 12), (12, 22), (22, WIDTH)],
    "head": [(0, 6), (6, 12), (12, 22), (22, 26), (26, 30), (30, WIDTH)],
}


def centered(transform: JointTransform, seed: int = 1) -> Tensor:
    return torch.from_numpy(vectors(seed=seed)).float() - transform.mean


@pytest.mark.parametrize("weighed", [True, False])
@pytest.mark.parametrize("scope", SPANS)
def test_coefficients_are_those_of_numpy_in_float64(scope: str, weighed: bool) -> None:
    transform, encoder, _, _ = planted(SPANS[scope], weighed)
    x = centered(transform)
    y, expected = transform.encode(x, 0.5), torch.from_numpy(x.double().numpy() @ encoder.T) / 0.5
    assert y.shape[1] == transform.coefficients == WIDTH
    error = (y - expected).square().mean(0).sqrt() / expected.square().mean().sqrt()
    assert float(error.max()) < 2e-3


@pytest.mark.parametrize("weighed", [True, False])
@pytest.mark.parametrize("scope", SPANS)
def test_a_full_basis_loses_float16_rounding_alone(scope: str, weighed: bool) -> None:
    transform, _, _, metric = planted(SPANS[scope], weighed)
    x = centered(transform)
    error = (transform.decode(transform.encode(x, 0.03), 0.03) - x).double().numpy()
    whole = x.double().numpy()
    cost, total = (np.einsum("ni,ij,nj->n", e, metric, e).mean() for e in (error, whole))
    assert cost < (2**-10) ** 2 * 10 * total
    assert np.square(error).mean() < 1e-4 * np.square(whole).mean()


@pytest.mark.parametrize("weighed", [True, False])
@pytest.mark.parametrize("scope", SPANS)
def test_rounding_of_the_basis_is_solved_for_and_not_ignored(scope: str, weighed: bool) -> None:
    transform, encoder, _, metric = planted(SPANS[scope], weighed)
    x = centered(transform)
    rows = np.zeros((WIDTH, WIDTH))
    at = 0
    for basis in transform.bases:
        rows[at : at + len(basis.rows), basis.start : basis.stop] = basis.decoder(1.0).numpy()
        at += len(basis.rows)
    best = np.linalg.solve(rows @ metric @ rows.T, rows @ metric @ x.double().numpy().T).T

    def cost(y: np.ndarray) -> float:
        error = x.double().numpy() - y @ rows
        return float(np.einsum("ni,ij,nj->n", error, metric, error).mean())

    ignored = cost(x.double().numpy() @ encoder.T)
    assert cost(transform.encode(x, 1.0).double().numpy()) < 1e-3 * ignored
    np.testing.assert_allclose(transform.encode(x, 1.0).numpy(), best, atol=2e-5 * np.abs(best).max())


def test_rows_that_depend_on_each_other_are_refused_by_the_encoder_alone() -> None:
    transform = planted(SPANS["joint"])[0]
    (basis,) = transform.bases
    twice = Basis(0, WIDTH, basis.rows[[0, 1, 0]], basis.scale[[0, 1, 0]])
    harmed = JointTransform(transform.mean, (twice,), transform.metrics)
    assert harmed.decode(torch.ones(2, 3), 1.0).isfinite().all()
    with pytest.raises(CodecError, match="linearly dependent rows"):
        harmed.encode(centered(transform), 1.0)


@pytest.mark.parametrize("mode", [torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)])
def test_what_is_made_at_the_first_call_is_of_no_mode(mode) -> None:
    transform, x = planted(SPANS["joint"])[0], centered(planted(SPANS["joint"])[0])
    with mode():
        transform.encode(x, 1.0)
    again = transform.encode(x.requires_grad_(), 1.0)
    again.sum().backward()
    assert torch.equal(again.detach(), planted(SPANS["joint"])[0].encode(x.detach(), 1.0))


@pytest.mark.parametrize("scope", SPANS)
def test_the_square_of_the_coefficients_is_the_cost_of_the_vector(scope: str) -> None:
    transform, _, _, metric = planted(SPANS[scope])
    x = centered(transform)
    cost = np.einsum("ni,ij,nj->n", x.double().numpy(), metric, x.double().numpy())
    assert transform.encode(x, 1.0).square().sum(1).numpy() == pytest.approx(cost, rel=5e-3)


@pytest.mark.parametrize("scope", SPANS)
def test_without_some_coefficients_the_cost_is_their_eigenvalues(scope: str) -> None:
    transform, _, spectrum, metric = planted(SPANS[scope])
    dropped, bases, at = 0.0, [], 0
    for basis in transform.bases:
        kept = len(basis.rows) // 2
        bases.append(Basis(basis.start, basis.stop, basis.rows[:kept], basis.scale[:kept]))
        dropped += spectrum[at + kept : at + len(basis.rows)].sum()
        at += len(basis.rows)
    restricted = JointTransform(transform.mean, tuple(bases), transform.metrics)
    x = torch.from_numpy(vectors()).float() - transform.mean  # what it was made of
    error = (restricted.decode(restricted.encode(x, 1.0), 1.0) - x).double().numpy()
    assert np.einsum("ni,ij,nj->n", error, metric, error).mean() == pytest.approx(dropped, rel=1e-2)


def test_a_group_may_be_left_without_coefficients() -> None:
    transform = planted(SPANS["layer"])[0]
    first, *rest = transform.bases
    empty = Basis(first.start, first.stop, first.rows[:0], first.scale[:0])
    restricted = JointTransform(transform.mean, (empty, *rest), transform.metrics)
    x = centered(transform)
    y = restricted.encode(x, 1.0)
    assert y.shape[1] == restricted.coefficients == WIDTH - 12
    assert torch.equal(y, transform.encode(x, 1.0)[:, 12:])
    assert not restricted.decode(y, 1.0)[:, :12].any()


def test_steps_scale_both_ways_and_leading_dimensions_do_not_matter() -> None:
    transform = planted(SPANS["joint"])[0]
    x = centered(transform)
    torch.testing.assert_close(transform.encode(x, 8.0), transform.encode(x, 1.0) / 8, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(transform.decode(x, 8.0), transform.decode(x, 1.0) * 8, rtol=1e-5, atol=1e-3)
    folded = transform.encode(x.view(20, 30, WIDTH), 1.0)
    torch.testing.assert_close(folded.view(600, -1), transform.encode(x, 1.0), rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("size", [1e-30, 1e-6, 1.0, 1e6, 1e30])
def test_rows_of_any_size_fit_into_float16_with_their_scale(size: float) -> None:
    decoder = torch.randn(5, 40, dtype=torch.float64) * size * torch.tensor([1, 10, 100, 1e3, 1e4])[:, None]
    basis = Basis.of(3, decoder)
    assert (basis.start, basis.stop) == (3, 43) and basis.rows.dtype == torch.float16
    assert float(basis.rows.abs().amax(1).min()) == 1.0
    again = basis.decoder(1.0).double()
    assert bool(((again - decoder).abs() <= decoder.abs() * 2**-11 * 1.01 + decoder.abs().amax(1, True) * 2**-24).all())
    assert not Basis.of(0, torch.zeros(1, 4)).decoder(1.0).any()


def test_what_is_held_is_mean_rows_scales_and_metrics() -> None:
    transform = planted(SPANS["layer"])[0]
    held = sum(t.nbytes for t in transform.tensors())
    rows = sum((b - a) ** 2 for a, b in SPANS["layer"])
    metrics = sum(h * d * d for h, d in zip(HEADS, DIM, strict=True))
    assert held == 4 * WIDTH + 2 * rows + 4 * WIDTH + 4 * metrics


def test_no_blocks_are_the_identity_and_blocks_a_block_diagonal_product() -> None:
    x = torch.from_numpy(vectors(7))
    assert block_product(x, ()) is x
    product = block_product(x, [torch.from_numpy(m) for m in blocks()])
    torch.testing.assert_close(product, x @ torch.from_numpy(block_diagonal(blocks())))
