"""The transform of `eigen` against NumPy in float64: its integers, what they are decoded to, and what is lost."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from eigen_chain import assert_is_chain, block_diagonal, dead_zones, float64, plain, rows_of
from eigencache.codec.eigen.transform import Stage, StagedTransform
from eigencache.errors import CodecError
from eigencache.spectral.metric import block_product
from staged_transforms import DIM, HEADS, SPANS, WIDTH, inverse_roots, metric, planted, vectors, weighed

SCOPES = pytest.mark.parametrize("scope", SPANS)


@pytest.mark.parametrize("told", [False, True])
@pytest.mark.parametrize("share", [0.5, 1.0])
@pytest.mark.parametrize("chained", [False, True])
@SCOPES
def test_integers_and_what_they_are_decoded_to_are_those_of_numpy_in_float64(
    scope: str, chained: bool, share: float, told: bool
) -> None:
    transform = planted(scope, chained, share=share)[0]
    z = weighed(transform)
    first = z[:, slice(*SPANS[scope][0])].roll(1, 0) * 0.7 if told else None
    integers = assert_is_chain(transform, z, 0.5, dead_zones(transform.coefficients), first)
    assert transform.coefficients == integers.shape[1] == sum(len(rows_of(stage)) for stage in transform.stages)
    assert bool((integers.abs().amax(0) > 0).any())


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_vectors_are_weighed_by_the_inverse_of_the_blocks_that_are_stored(dtype: torch.dtype) -> None:
    blocks = inverse_roots(dtype)
    transform = replace(planted("joint")[0], inverse_roots=blocks)
    x = torch.from_numpy(vectors(seed=1)).float() - transform.mean
    z = transform.weighed(x)
    expected = float64(x) @ np.linalg.inv(block_diagonal(blocks))
    assert z.dtype == transform.centered(z).dtype == torch.float32
    np.testing.assert_allclose(z.numpy(), expected, atol=1e-5 * np.abs(expected).max())
    np.testing.assert_allclose(transform.centered(z).numpy(), x.numpy(), atol=1e-5 * float(x.abs().max()))
    product = float64(z) @ block_diagonal(blocks)
    np.testing.assert_allclose(transform.centered(z).numpy(), product, atol=1e-5 * np.abs(product).max())


def test_blocks_of_one_width_are_multiplied_as_blocks_of_many() -> None:
    square = torch.randn(3, 4, 4, generator=torch.Generator().manual_seed(0)) + 4 * torch.eye(4)
    apart = StagedTransform(torch.zeros(12), (Stage.of(0, torch.eye(12)),), (square[:1], square[1:]))
    x = torch.randn(5, 7, 12, generator=torch.Generator().manual_seed(1))
    expected = float64(x) @ np.linalg.inv(block_diagonal([square]))
    np.testing.assert_allclose(apart.weighed(x).numpy(), expected, atol=1e-6)
    np.testing.assert_allclose(apart.centered(apart.weighed(x)).numpy(), x.numpy(), atol=1e-5)


def test_without_a_metric_vectors_are_what_they_are() -> None:
    transform = planted("layer", weighed=False)[0]
    x = torch.from_numpy(vectors(seed=1)).float()
    assert transform.weighed(x) is x and transform.centered(x) is x


@SCOPES
def test_the_square_of_an_error_in_the_metric_is_its_cost(scope: str) -> None:
    transform = planted(scope)[0]
    x = torch.from_numpy(vectors(seed=1)).float() - transform.mean
    whole = block_diagonal([torch.from_numpy(m) for m in metric()])
    cost = np.einsum("ni,ij,nj->n", float64(x), whole, float64(x))
    assert transform.weighed(x).square().sum(1).numpy() == pytest.approx(cost, rel=1e-4)
    count = transform.coefficients
    integers = transform.quantize(transform.weighed(x), 1e-3, plain(count))
    assert (1e-3 * integers.double()).square().sum(1).numpy() == pytest.approx(cost, rel=2e-2)  # rows are near length 1


@pytest.mark.parametrize("chained", [False, True])
@SCOPES
def test_a_full_basis_loses_the_rounding_of_integers_alone(scope: str, chained: bool) -> None:
    transform = planted(scope, chained, fine=0)[0]
    z = weighed(transform)
    for step in (1e-3, 0.03, 1.0):
        q = transform.quantize(z, step, plain(WIDTH))
        error = (transform.dequantize(q, step, plain(WIDTH)) - z).square().mean(0)
        assert float(error.max()) < 1.3 * (step**2 / 12 + float(z.abs().max() * 1e-7) ** 2)


@pytest.mark.parametrize("chained", [False, True])
@SCOPES
def test_what_a_stage_leaves_is_least_among_all_coefficients(scope: str, chained: bool) -> None:
    transform = planted(scope, chained, share=0.5)[0]
    z, fine = weighed(transform), plain(transform.coefficients)
    decoded = transform.dequantize(transform.quantize(z, 1e-4, fine), 1e-4, fine)
    for stage in transform.stages:
        left = float64(z - decoded)[:, stage.start : stage.stop]
        assert np.abs(left @ rows_of(stage).T).max() < 3e-4 + 1e-5 * float(z.abs().max())
        assert np.square(left).sum() > 0


@pytest.mark.parametrize("fine", [0, 3, WIDTH])
@SCOPES
def test_without_some_coefficients_the_cost_is_their_eigenvalues(scope: str, fine: int) -> None:
    transform, spectrum = planted(scope, fine=fine, share=0.5)
    dropped = sum(spectrum[a + len(stage) : b].sum() for (a, b), stage in zip(SPANS[scope], transform.stages, strict=True))
    z, step = weighed(transform, seed=0), 1e-3  # what it was made of
    q = transform.quantize(z, step, plain(transform.coefficients))
    error = float64(transform.centered(transform.dequantize(q, step, plain(transform.coefficients)) - z))
    whole = block_diagonal([torch.from_numpy(m) for m in metric()])
    cost = np.einsum("ni,ij,nj->n", error, whole, error).mean()
    assert 0.999 * dropped < cost < (1.05 if fine == 0 else 1.01) * dropped  # rounded rows span a little less


@pytest.mark.parametrize("column", [0, 15, WIDTH - 1])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e12])
def test_what_is_no_number_or_too_large_is_refused_in_any_stage(column: int, bad: float) -> None:
    transform = planted("layer", chained=True)[0]
    z = weighed(transform)
    z[7, column] = bad
    with pytest.raises(CodecError, match="the cache holds NaN or is of another model"):
        transform.quantize(z, 0.5, plain(WIDTH))


@pytest.mark.parametrize("mode", [torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)])
@pytest.mark.parametrize("decoded_first", [False, True])
def test_what_is_made_at_the_first_call_is_of_no_mode(decoded_first: bool, mode) -> None:
    transform, same = (
        replace(planted("layer", chained=True)[0], inverse_roots=inverse_roots(torch.float16)) for _ in range(2)
    )
    x = torch.from_numpy(vectors(seed=1)).float() - transform.mean
    quantizer = dead_zones(WIDTH)
    integers = same.quantize(same.weighed(x), 0.5, quantizer)
    with mode():
        if decoded_first:
            transform.centered(transform.dequantize(integers, 0.5, quantizer))
        transform.quantize(transform.weighed(x), 0.5, quantizer)
    q = transform.quantize(transform.weighed(x), 0.5, quantizer)
    assert torch.equal(q, integers)
    decoded = transform.dequantize(q, 0.5, quantizer)
    assert torch.equal(decoded, same.dequantize(q, 0.5, quantizer))
    assert torch.equal(transform.centered(decoded), same.centered(decoded))
    transform.centered(transform.weighed(x.requires_grad_())).sum().backward()
    (transform.weighed(x)[:, :12] @ transform.stages[0].encoder @ transform.stages[0].rows).sum().backward()
    cached = [t for s in transform.stages for t in (s.rows, s.encoder)] + [*transform._roots, *transform._inverses]
    cached += [s.prediction.weights for s in transform.stages if s.prediction is not None]
    assert not any(t.is_inference() or t.requires_grad or t.dtype != torch.float32 for t in cached)


def test_vectors_and_steps_scale_together_and_leading_dimensions_do_not_matter() -> None:
    transform = planted("layer", chained=True)[0]
    z, quantizer = weighed(transform), dead_zones(WIDTH)
    q = transform.quantize(z, 0.5, quantizer)
    assert torch.equal(transform.quantize(8 * z, 4.0, quantizer), q)
    decoded = transform.dequantize(q, 0.5, quantizer)
    assert torch.equal(transform.dequantize(q, 4.0, quantizer), 8 * decoded)
    folded, first = z.view(20, 30, WIDTH), z[:, :12].roll(1, 0)
    for told in (None, first):
        flat = transform.quantize(z, 0.5, quantizer, told)
        again = transform.quantize(folded, 0.5, quantizer, None if told is None else told.view(20, 30, 12))
        assert again.shape == (20, 30, WIDTH)
        assert float((again.view(600, -1) != flat).float().mean()) < 1e-3
        back = transform.dequantize(flat.view(20, 30, -1), 0.5, quantizer, None if told is None else told.view(20, 30, 12))
        torch.testing.assert_close(
            back.view(600, -1), transform.dequantize(flat, 0.5, quantizer, told), rtol=1e-5, atol=1e-4
        )


def test_what_is_held_is_mean_stages_and_blocks() -> None:
    transform = planted("layer", chained=True)[0]
    for one in (transform, transform.to("cpu")):
        rows = sum((b - a) ** 2 for a, b in SPANS["layer"])
        fine = sum(3 * (b - a) for a, b in SPANS["layer"])
        predictions = (12 * 10 + 4 * 10 + 4 * 12) + (10 * 12 + 4 * 12 + 4 * 10)
        blocks = 4 * sum(h * d * d for h, d in zip(HEADS, DIM, strict=True))
        assert sum(t.nbytes for t in one.tensors()) == 4 * WIDTH + (rows + fine) + 4 * WIDTH + predictions + blocks
        assert all(torch.equal(a, b) for a, b in zip(one.tensors(), transform.tensors(), strict=True))
    turned = tuple(b.mT.contiguous().mT for b in transform.inverse_roots)
    assert all(b.is_contiguous() for b in replace(transform, inverse_roots=turned).inverse_roots)


def test_no_blocks_are_the_identity_and_blocks_a_block_diagonal_product() -> None:
    x = torch.from_numpy(vectors(7))
    assert block_product(x, ()) is x
    blocks = [torch.from_numpy(m) for m in metric()]
    torch.testing.assert_close(block_product(x, blocks), x @ torch.from_numpy(block_diagonal(blocks)))
