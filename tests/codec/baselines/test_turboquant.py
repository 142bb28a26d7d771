"""TurboQuant keeps a norm and a direction; the codebook is Lloyd's and Max's; outer layers stay in 16 bits."""

import math

import pytest
import torch

from baseline_caches import GQA, MLA, cache, relative_error
from eigencache.codec.baselines.lloyd_max import borders, gaussian_codebook
from eigencache.codec.baselines.turboquant import random_orthogonal, turboquant
from eigencache.errors import CodecError

# Max 1960, Table I: the positive numbers, and the mean squared error
KNOWN = {
    1: ([0.7979], 0.3634),
    2: ([0.4528, 1.5104], 0.1175),
    3: ([0.2451, 0.7560, 1.3439, 2.1520], 0.03454),
    4: ([0.1284, 0.3881, 0.6568, 0.9424, 1.2562, 1.6181, 2.0690, 2.7326], 0.009497),
}
WIDTHS = {i: (first[1], second[1]) for i, (first, second) in GQA.items()}


@pytest.mark.parametrize("bits", KNOWN)
def test_the_codebook_is_the_published_one(bits: int) -> None:
    numbers, _ = KNOWN[bits]
    found = gaussian_codebook(bits)
    assert found[2 ** (bits - 1) :].tolist() == pytest.approx(numbers, abs=2e-4)
    assert found.tolist() == pytest.approx((-found.flip(0)).tolist(), abs=1e-6)


def test_one_bit_is_the_mean_of_half_a_gaussian_and_every_number_the_mean_of_its_cell() -> None:
    assert gaussian_codebook(1)[1].item() == pytest.approx(math.sqrt(2 / math.pi), abs=1e-6)
    x = torch.randn(1_000_000, generator=torch.Generator().manual_seed(0))
    codes = torch.bucketize(x, borders(gaussian_codebook(3)))
    means = torch.stack([x[codes == i].mean() for i in range(8)])
    assert torch.allclose(means, gaussian_codebook(3), atol=0.01)


def test_the_basis_is_orthogonal_seeded_and_of_any_width() -> None:
    for width in (1, 5, 64):
        basis = random_orthogonal(width, 3)
        assert torch.allclose(basis @ basis.mT, torch.eye(width), atol=1e-6)
        assert torch.equal(basis, random_orthogonal(width, 3))
    assert not torch.equal(random_orthogonal(5, 3), random_orthogonal(5, 4))


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_error_is_the_codebooks_whatever_the_vectors_are(bits) -> None:
    wide = {0: ((2, 128), (2, 128))}
    cached = cache(wide, 200)
    cached[0][0][..., 5] += 100  # an outlier channel, which the rotation spreads
    codec = turboquant({0: (128, 128)}, bits, torch.float32, boundary_layers=0)
    for slot, x in enumerate(cached[0]):
        found = codec.decode(codec.encode(cached, 0))[0][slot]
        error = float((found - x).square().sum() / x.square().sum())
        assert error == pytest.approx(KNOWN[bits][1], rel=0.25 if slot == 0 else 0.1)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_a_vector_takes_its_bits_and_sixteen_for_its_norm(bits) -> None:
    cached = cache(GQA)
    encoded = turboquant(WIDTHS, bits, torch.float32, boundary_layers=0).encode(cached, 0)
    vectors = 2 * len(GQA) * 2 * 2 * 37  # rows, layers, slots, heads, tokens
    assert encoded.nbytes == vectors * (32 * bits // 8 + 2)


def test_the_first_and_last_two_layers_are_exact_in_sixteen_bits() -> None:
    cached = cache(GQA, dtype=torch.bfloat16)
    codec = turboquant(WIDTHS, 3, torch.bfloat16)
    decoded = codec.decode(codec.encode(cached, 0))
    for layer_idx in (0, 1, 5, 6):
        assert torch.equal(decoded[layer_idx][0], cached[layer_idx][0])
        assert torch.equal(decoded[layer_idx][1], cached[layer_idx][1])
    assert not torch.equal(decoded[2][0], cached[2][0])
    assert turboquant({0: (8, 8), 1: (8, 8), 2: (8, 8)}, 3, torch.float32).sixteen_bit == {0, 2}


def test_values_as_vllm_stores_them_are_uniform_and_directions_keep_their_length() -> None:
    cached = cache(GQA)
    codec = turboquant(WIDTHS, 4, torch.float32, boundary_layers=0, values="uniform", renormalized=True)
    encoded = codec.encode(cached, 0)
    decoded = codec.decode(encoded)
    norms = cached[2][0].norm(dim=-1)
    assert ((decoded[2][0].norm(dim=-1) - norms).abs() <= 1e-3 * norms).all()
    steps = encoded.tensors["2.1.step"].float()
    assert ((decoded[2][1] - cached[2][1]).abs() <= steps / 2 + 1e-4).all()
    assert encoded.nbytes == 2 * len(GQA) * 2 * 37 * ((32 * 4 // 8 + 2) + (32 * 4 // 8 + 4))


def test_bases_and_codebooks_count_and_values_may_have_other_bits() -> None:
    widths = {i: (first[1], second[1]) for i, (first, second) in MLA.items()}
    codec = turboquant(widths, 4, torch.float32, value_bits=3, boundary_layers=0)
    assert codec.nbytes == 4 * (40 * 40 + 8 * 8) + 4 * (16 + 8)
    assert codec.name == "turboquant 4/3 bit"
    cached = cache(MLA)
    assert relative_error(cached, codec.decode(codec.encode(cached, 0))) < 0.05


def test_zero_vectors_come_back_and_other_models_and_too_long_vectors_are_refused() -> None:
    codec = turboquant({0: (8, 8)}, 3, torch.float32, boundary_layers=0)
    zero = {0: (torch.zeros(1, 1, 2, 8), torch.zeros(1, 1, 2, 8))}
    assert torch.equal(codec.decode(codec.encode(zero, 0))[0][0], zero[0][0])
    with pytest.raises(CodecError, match="no basis of width 9"):
        codec.encode({0: (torch.zeros(1, 1, 2, 9), torch.zeros(1, 1, 2, 9))}, 0)
    with pytest.raises(CodecError, match="layer 0: a norm of"):
        codec.encode({0: (torch.full((1, 1, 2, 8), 6e4), torch.zeros(1, 1, 2, 8))}, 0)
