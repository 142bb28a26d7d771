"""KVTC's bytes are within its budget before DEFLATE, its error falls with the budget, and its components are principal."""

import functools

import pytest
import torch

from baseline_caches import GQA, MLA, cache, layouts, numbers_of, relative_error
from eigencache.codec.base import EncodedBytes
from eigencache.codec.baselines.kvtc import KVTC
from eigencache.codec.baselines.kvtc_fit import FittedKVTC, fit_kvtc, principal_components
from eigencache.codec.baselines.kvtc_formats import BITS, from_codes, group_bits, shift_and_scale, to_codes
from eigencache.codec.layout import Layout
from eigencache.errors import CodecError

MIXED = {i: torch.randn(640, 64, generator=torch.Generator().manual_seed(i)) for i in (0, 1)}


def correlated(seq: int = 41, seed: int = 0, batch: int = 2) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
    """A cache whose layers and heads follow 24 common numbers per token, and a little of their own."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(2, 320, 24, generator=torch.Generator().manual_seed(9)) * torch.linspace(2, 0.2, 24)
    x = torch.randn(batch, seq, 24, generator=generator) @ weights.flatten(0, 1).mT
    x = x + 0.05 * torch.randn(batch, seq, 640, generator=generator) + 3
    keys, values = (part.unflatten(-1, (5, 2, 32)) for part in x.chunk(2, -1))
    return {i: (keys[:, :, n].transpose(1, 2), values[:, :, n].transpose(1, 2)) for n, i in enumerate(GQA)}


@functools.cache
def fitted(rotated_slot: int | None = None) -> tuple[FittedKVTC, list[Layout]]:
    found = layouts(GQA, rotated_slot)
    calibration = correlated(100, seed=1, batch=3)
    samples = [(layout, layout.vectors(calibration, 0).flatten(0, 1)) for layout in found]
    return fit_kvtc(samples, torch.float32, sizes=(1, 16, 64)), found


@pytest.mark.parametrize("kind", BITS)
def test_formats_err_by_half_a_step_or_a_sixteenth(kind: str) -> None:
    x = torch.randn(3, 7, 16, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 3, 7)[:, None] + 5
    shift, scale = shift_and_scale(x, kind)
    assert shift.dtype == scale.dtype == torch.float16
    again = from_codes(to_codes(x, kind, shift, scale), kind, shift, scale)
    error, unit = (again - x).abs(), scale.float()[..., None]
    bound = unit / 2 if kind != "fp8" else torch.maximum((x - shift.float()[..., None]).abs() / 16, unit * 2**-10)
    assert (error <= bound * (1 + 1e-4) + 1e-5).all()
    assert group_bits(kind, 16) == 16 * BITS[kind] + 32


@pytest.mark.parametrize("n", [30, 90])
def test_components_are_principal_and_orthonormal_with_more_or_fewer_vectors_than_dimensions(n: int) -> None:
    x = torch.randn(n, 40, generator=torch.Generator().manual_seed(0)) * torch.linspace(3, 0.3, 40) + 7
    mean, basis = principal_components(x)
    rank = min(n - 1, 40)
    assert basis.shape == (40, rank)
    assert torch.allclose(mean, x.mean(0), atol=1e-5)
    assert torch.allclose(basis.mT @ basis, torch.eye(rank), atol=1e-5)
    variances = ((x - mean) @ basis).square().sum(0)
    assert torch.allclose(variances, torch.linalg.svdvals(x - mean)[:rank].square(), rtol=1e-3)
    assert principal_components(x, 5)[1].shape == (40, 5)


@pytest.mark.parametrize("bits_per_value", [0.25, 0.5, 1.0, 2.0])
def test_bytes_are_within_the_budget_and_deflate_adds_next_to_nothing(bits_per_value: float) -> None:
    codec = fitted()[0].at(bits_per_value, sinks=0, window=0).codec
    assert isinstance(codec, KVTC)
    assert codec.name == f"kvtc {bits_per_value:g} bit"
    for kind in codec.kinds:
        assert sum(group_bits(g.kind, g.size) for g in kind.groups) <= bits_per_value * 320
        assert [g.start for g in kind.groups] == [sum(h.size for h in kind.groups[:i]) for i in range(len(kind.groups))]
    cached = correlated(41)
    encoded = codec.encode(cached, 0)
    assert isinstance(encoded, EncodedBytes)
    before = sum(kind.packed_nbytes(41) for kind in codec.kinds)
    rounding = sum(len(kind.groups) for kind in codec.kinds)
    assert before <= bits_per_value * numbers_of(cached) / 2 / 8 + rounding
    assert encoded.nbytes <= 2 * (before + 16)


def test_the_error_falls_with_the_budget_and_is_that_of_the_formats() -> None:
    cached, (fit, _) = correlated(60), fitted()
    errors = []
    for bits_per_value in (0, 0.25, 0.5, 1.0, 3.0):
        codec = fit.at(bits_per_value, sinks=0, window=0)
        errors.append(relative_error(cached, codec.decode(codec.encode(cached, 0))))
    assert errors == sorted(errors, reverse=True)
    assert errors[1] < 0.2 * errors[0]
    assert errors[-1] < 1e-4


def test_errors_measured_on_other_vectors_buy_fewer_components_that_only_fit_the_calibration() -> None:
    generator = torch.Generator().manual_seed(3)
    layout = layouts(GQA)[1]
    weights = torch.randn(8, 320, generator=generator)

    def drawn(n: int) -> torch.Tensor:
        return torch.randn(n, 8, generator=generator) @ weights + torch.randn(n, 320, generator=generator)

    vectors, others, true = drawn(60), drawn(60), drawn(200)
    errors = []
    for held_out in (None, [others]):
        kind = fit_kvtc([(layout, vectors)], torch.float32, sizes=(1, 16), held_out=held_out).kinds[0].at(1.0)
        y = (true - kind.mean) @ kind.basis
        lost = (true - kind.mean).square().sum() - y.square().sum()
        for first, size, name in kind.groups:
            x = y[:, first : first + size]
            shift, scale = shift_and_scale(x, name)
            lost = lost + (from_codes(to_codes(x, name, shift, scale), name, shift, scale) - x).square().sum()
        errors.append(float(lost))
    assert errors[1] < errors[0]


def test_keys_are_stored_before_rotation_at_their_positions() -> None:
    fit, (keys, _) = fitted(rotated_slot=0)
    codec = fit.at(2.0, sinks=0, window=0).codec
    plain = correlated(20)
    vectors = layouts(GQA, None)[0].vectors(plain, 0)
    slots = keys.slots(vectors, 1000)  # the same keys, rotated to positions from 1000 on
    cached = {i: (slots[i, 0], plain[i][1]) for i in plain}
    found, _ = fitted(rotated_slot=None)
    unaware = found.at(2.0, sinks=0, window=0)
    aware = fit_kvtc(
        [(layout, layout.vectors(cached, 1000).flatten(0, 1)) for layout in layouts(GQA, 0)],
        torch.float32,
        sizes=(1, 16, 64),
    ).at(2.0, sinks=0, window=0)
    assert relative_error(cached, aware.decode(aware.encode(cached, 1000))) < 1e-3
    assert relative_error(cached, unaware.decode(unaware.encode(cached, 1000))) > 0.01
    assert codec.encode(cached, 1000).start == 1000


def test_the_first_four_tokens_are_fp8_and_the_last_128_exact() -> None:
    cached = {i: (k.half(), v.half()) for i, (k, v) in correlated(4 + 10 + 128).items()}
    fit = fitted()[0]
    codec = FittedKVTC(fit.kinds, torch.float16).at(0.5)
    encoded = codec.encode(cached, 0)
    decoded = codec.decode(encoded)
    for layer_idx, both in cached.items():
        for x, again in zip(both, decoded[layer_idx], strict=True):
            assert torch.equal(again[:, :, -128:], x[:, :, -128:])
            assert ((again - x)[:, :, :4].abs() <= x[:, :, :4].abs() / 16 + 0.01).all()
    sinks, coded, window = (part.nbytes for _, part in encoded.parts)
    assert sinks == 2 * 4 * (640 + 2 * 20)
    assert window == 2 * 128 * 640 * 2
    assert coded <= 2 * 10 * 640 * 0.5 / 8 + 64
    assert len(codec.encode(cached, 7).parts) == 2  # no sinks away from the start


def test_only_what_is_used_of_a_basis_counts_and_is_held() -> None:
    codec = fitted()[0].at(0.25, sinks=0, window=0).codec
    used = [sum(g.size for g in kind.groups) for kind in codec.kinds]
    assert max(used) < 200
    assert codec.nbytes == sum(4 * 320 * (1 + n) for n in used)


def test_latents_and_rotary_keys_are_two_kinds_of_unequal_width() -> None:
    cached = cache(MLA, 33)
    samples = [(layout, layout.vectors(cached, 0).flatten(0, 1)) for layout in layouts(MLA, 1)]
    codec = fit_kvtc(samples, torch.float32).at(5.0, sinks=0, window=0)
    assert relative_error(cached, codec.decode(codec.encode(cached, 0))) < 0.05


def test_other_layers_other_streams_and_bad_calibration_are_refused() -> None:
    codec = fitted()[0].at(0.5, sinks=0, window=0).codec
    cached = correlated(9)
    with pytest.raises(CodecError, match="has no layer 17"):
        codec.encode(cached | {17: cached[0]}, 0)
    with pytest.raises(CodecError, match="another codec encoded them"):
        codec.decode(EncodedBytes(codec.encode(cached, 0).rows, 0, 8))
    layout = layouts(GQA)[0]
    for vectors in (torch.zeros(1, 320), torch.zeros(9, 319), torch.full((9, 320), torch.nan)):
        with pytest.raises(CodecError, match="calibration vectors"):
            fit_kvtc([(layout, vectors)], torch.float32)
