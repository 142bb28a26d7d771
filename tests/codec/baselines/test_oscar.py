"""OSCAR's bases are orthogonal, mix what its eigenvectors separate, and its clips are those of least error."""

import pytest
import torch

from baseline_caches import GQA, MLA, ODD, cache, moments, numbers_of
from eigencache.codec.baselines.oscar import OSCAR, PUBLISHED_CLIPS, clipped, fit_oscar, hadamard
from eigencache.errors import CodecError


def fit(shapes: dict, **options) -> OSCAR:
    codec = fit_oscar(moments(shapes, 0), moments(shapes, 1), torch.float32, sinks=0, window=0, **options).codec
    assert isinstance(codec, OSCAR)
    return codec


@pytest.mark.parametrize("shapes", [GQA, ODD])
def test_bases_are_orthogonal_per_head_also_where_a_head_is_no_power_of_two(shapes: dict) -> None:
    codec = fit(shapes)
    for (layer_idx, slot), basis in codec.bases.items():
        heads, width = shapes[layer_idx][slot]
        assert basis.shape == (heads, width, width)
        assert torch.allclose(basis @ basis.mT, torch.eye(width).expand(heads, -1, -1), atol=1e-5)
    assert codec.nbytes == sum(4 * heads * width**2 for both in shapes.values() for heads, width in both)
    assert codec.clips == PUBLISHED_CLIPS


def test_every_coordinate_gets_the_same_share_of_the_queries_energy() -> None:
    """Eigenvectors alone would concentrate it; Hadamard's matrix spreads it evenly over all coordinates."""
    codec = fit(GQA)
    matrix = moments(GQA, 0)[2]
    basis = codec.bases[2, 0]
    energy = (basis * (matrix @ basis)).sum(1)
    assert torch.allclose(energy, energy.mean(-1, keepdim=True).expand_as(energy), rtol=1e-4)


def test_hadamard_is_normalized_and_orders_are_bit_reversed() -> None:
    assert torch.allclose(hadamard(8) @ hadamard(8).mT, torch.eye(8, dtype=torch.float64))
    assert (hadamard(8).abs() - 8**-0.5).abs().max() < 1e-12
    diagonal = torch.diag(torch.arange(1.0, 5.0))[None]  # eigenvectors are the axes, by rising eigenvalue
    basis = fit_oscar({0: diagonal}, {}, torch.float32).codec.bases[0, 0][0]
    assert torch.allclose(basis.abs(), hadamard(4)[:, [3, 1, 2, 0]].float().abs())
    assert torch.allclose(basis.double().mT @ basis.double(), torch.eye(4, dtype=torch.float64), atol=1e-6)


def test_clipping_holds_a_vector_within_a_quantile_of_its_magnitudes() -> None:
    y = torch.tensor([[1.0, -2.0, 3.0, -100.0]])
    assert clipped(y, 0.5).tolist() == [[1.0, -2.0, 3.0, -3.0]]
    assert torch.equal(clipped(y, 1.0), y)
    assert torch.equal(clipped(y, 0.76), y)


@pytest.mark.parametrize("bits", [2, 4])
def test_a_head_of_128_takes_a_quarter_bit_more_than_its_codes(bits) -> None:
    shapes = {0: ((1, 128), (1, 128))}
    cached = cache(shapes, 9)
    assert 8 * fit(shapes, bits=bits).encode(cached, 0).nbytes == (bits + 0.25) * numbers_of(cached)


def test_without_clipping_errors_are_half_a_step_in_the_rotated_frame() -> None:
    cached = cache(GQA)
    codec = fit(GQA)
    codec = OSCAR(codec.bases, (1.0, 1.0), 2, torch.float32)
    encoded = codec.encode(cached, 0)
    error = (codec.decode(encoded)[2][1] - cached[2][1]) @ codec.bases[2, 1]
    assert (error.abs() <= encoded.tensors["2.1.step"].float() / 2 + 1e-4).all()


def test_clips_are_those_of_least_error_on_a_sample() -> None:
    """In the rotated frame all numbers are ±1 and ±⅓, which two bits hold exactly, but for one that is 2."""
    codec = fit(GQA)
    spiky = {}
    for layer_idx in GQA:
        drawn = torch.randint(4, (2, 2, 40, 32), generator=torch.Generator().manual_seed(layer_idx))
        y = drawn * (2 / 3) - 1
        y[..., 3] = 2
        spiky[layer_idx] = tuple(y @ codec.bases[layer_idx, slot].mT for slot in (0, 1))
    chosen = fit(GQA, sample=spiky, clip_candidates=(1.0, 0.94)).clips
    assert chosen == (0.94, 0.94)
    exact = {}
    for layer_idx in GQA:
        y = torch.full((2, 2, 40, 32), 1 / 3) * torch.tensor([1.0, -1.0]).repeat(16)
        y[..., 3] = 1
        y[..., 4] = -1
        exact[layer_idx] = tuple(y @ codec.bases[layer_idx, slot].mT for slot in (0, 1))
    assert fit(GQA, sample=exact, clip_candidates=(0.5, 1.0)).clips == (1.0, 1.0)


def test_sixty_four_sinks_and_256_recent_tokens_are_exact_and_rotary_keys_of_latents_too() -> None:
    cached = cache(MLA, 64 + 7 + 256, dtype=torch.bfloat16)
    codec = fit_oscar(moments(MLA, 0), {}, torch.bfloat16)
    decoded = codec.decode(codec.encode(cached, 0))
    for layer_idx, (latent, rope) in cached.items():
        assert torch.equal(decoded[layer_idx][1], rope)
        assert torch.equal(decoded[layer_idx][0][:, :, :64], latent[:, :, :64])
        assert torch.equal(decoded[layer_idx][0][:, :, 71:], latent[:, :, 71:])
        assert not torch.equal(decoded[layer_idx][0][:, :, 64:71], latent[:, :, 64:71])


def test_other_models_and_nan_moments_are_refused() -> None:
    codec = fit(GQA)
    with pytest.raises(CodecError, match="no basis for layer 4"):
        codec.encode(cache({4: ODD[4]}), 0)
    with pytest.raises(CodecError, match="layer 0 has other heads"):
        codec.encode(cache({0: ((1, 32), (2, 32))}), 0)
    with pytest.raises(CodecError, match="moments hold NaN"):
        fit_oscar({0: torch.full((1, 4, 4), torch.nan)}, {}, torch.float32)
