"""Packed heads decode within half a step, saturate out of range, and are attended to without decoding."""

import numpy as np
import pytest
import torch
from torch import Tensor

from eigencache.codec.live.packed_heads import PackedHeads
from eigencache.codec.live.rotated_mean import KeyMean
from eigencache.errors import CodecError
from eigencache.kernels.packed.backend import CPU, REFERENCE, PackedBackend
from eigencache.kernels.packed.format import BLOCK, Widths, most_coefficients, unpack
from eigencache.spectral.rope import Rotation

DIM = 16
SPREAD: dict[
    str, tuple[int, tuple[Widths, ...]]
] = {  # heads of a bundle, widths of bundles; the first of every kind have as many coefficients as numbers
    "one head": (1, (Widths(8, 8, 0),)),
    "heads apart": (1, (Widths(0, 8, 8), Widths(16, 0, 0), Widths(0, 0, 16))),
    "two heads together": (2, (Widths(8, 16, 8), Widths(16, 8, 8))),
    "fewer than numbers": (2, (Widths(8, 8, 0), Widths(0, 0, 8), Widths(0, 16, 8))),
    "a bundle of none": (1, (Widths(0, 0, 0), Widths(8, 0, 8))),
    "nothing": (2, (Widths(0, 0, 0),)),
}
CASES = pytest.mark.parametrize(("share", "widths"), SPREAD.values(), ids=SPREAD)
EVERY = pytest.mark.parametrize("backend", (REFERENCE, CPU), ids=lambda backend: backend.name)
WITH_MEAN = pytest.mark.parametrize("with_mean", [False, True], ids=["plain", "rotated-mean"])


def planted(share: int, widths: tuple[Widths, ...], with_mean: bool = False, seed: int = 0) -> PackedHeads:
    """E of a random basis at random steps, D so that E Dᵀ = 1."""
    rng = np.random.default_rng(seed)
    numbers, most = share * DIM, most_coefficients(widths)
    encoder, decoder = np.zeros((2, len(widths), most, numbers))
    for i, w in enumerate(widths):
        basis = np.linalg.qr(rng.normal(size=(numbers, numbers)))[0] * np.geomspace(1, 3, numbers)
        steps = np.geomspace(0.02, 0.5, w.coefficients)[:, None]
        encoder[i, : w.coefficients] = np.linalg.inv(basis)[: w.coefficients] / steps
        decoder[i, : w.coefficients] = basis.T[: w.coefficients] * steps
    mean = torch.from_numpy(rng.normal(size=(share * len(widths), DIM))).float()
    rotated_mean = None
    if with_mean:
        large = torch.zeros_like(mean)
        large[:, [0, 2, 5, 7]] = torch.from_numpy(20 * rng.normal(size=(len(mean), 4))).float()  # pairs 0 and 2 of 5
        rotated_mean = KeyMean(large, Rotation(0.5 ** torch.arange(5, dtype=torch.float64), 1.1, "half"))
    return PackedHeads(widths, torch.from_numpy(encoder).float(), torch.from_numpy(decoder).float(), mean, rotated_mean)


def positions_of(batch: int, blocks: int) -> Tensor:
    """Positions [batch, tokens]; the second row begins below 0."""
    return torch.arange(BLOCK * blocks)[None] + torch.tensor([[13], [-9]])[:batch]


def taken_out(heads: PackedHeads, positions: Tensor) -> np.ndarray:
    """All means that encoding subtracts [batch, heads, tokens, dim], float64."""
    mean = heads.mean.double().numpy()[None, :, None] * np.ones((*positions.shape, 1))[:, None]
    return mean if heads.rotated_mean is None else mean + heads.rotated_mean.rotated_to(positions).double().numpy()


def centers(heads: PackedHeads) -> np.ndarray:
    """c of every coefficient [bundles, 1, most]; 0 beyond the last."""
    found = np.zeros((len(heads.widths), 1, most_coefficients(heads.widths)))
    for i, w in enumerate(heads.widths):
        found[i, 0, : w.coefficients] = [127.5] * w.eight + [7.5] * w.four + [1.5] * w.two
    return found


def expanded(heads: PackedHeads, z: np.ndarray) -> np.ndarray:
    """Dᵀ z [batch, heads, rows, dim] of coefficients [batch, bundles, rows, most], head by head."""
    share, decoder = len(heads.mean) // len(heads.widths), heads.decoder.double().numpy()
    found = np.zeros((len(z), len(heads.mean), z.shape[2], DIM))
    for head in range(len(heads.mean)):
        bundle, at = divmod(head, share)
        found[:, head] = z[:, bundle] @ decoder[bundle][:, at * DIM : (at + 1) * DIM]
    return found


def made_of(heads: PackedHeads, z: np.ndarray, positions: Tensor) -> Tensor:
    return torch.from_numpy(expanded(heads, z) + taken_out(heads, positions)).float()


def inside(heads: PackedHeads, batch: int, blocks: int, seed: int) -> np.ndarray:
    """Coefficients that do not saturate."""
    drawn = np.random.default_rng(seed).uniform(-1, 1, (batch, len(heads.widths), BLOCK * blocks, centers(heads).shape[2]))
    return drawn * (centers(heads) + 0.49 * (centers(heads) > 0))


@WITH_MEAN
@CASES
def test_what_is_decoded_is_within_half_a_step(share: int, widths: tuple[Widths, ...], with_mean: bool) -> None:
    heads, positions = planted(share, widths, with_mean), positions_of(2, 3)
    z = inside(heads, 2, 3, 1)
    packed = heads.encode(made_of(heads, z, positions), positions)
    assert packed.dtype == torch.uint8 and packed.shape == (2, 3, BLOCK * heads.bits // 8)
    whole = np.round(z + centers(heads)) - centers(heads)
    back = heads.decode(packed, positions).double().numpy()
    assert back.shape == (2, len(heads.mean), 3 * BLOCK, DIM)
    u = unpack(packed, widths).double().mT.numpy() - centers(heads)
    assert np.abs(u - z).max(initial=0) <= 0.5 + 2e-3  # float32 rounds the other way at a border
    assert (u == whole).mean() > 0.999 if u.size else not np.size(whole)
    np.testing.assert_allclose(back, expanded(heads, u) + taken_out(heads, positions), rtol=0, atol=1e-4)


@WITH_MEAN
def test_numbers_of_a_whole_basis_come_back_within_half_a_step_of_every_coefficient(with_mean: bool) -> None:
    for name in ("one head", "heads apart", "two heads together"):
        heads, positions = planted(*SPREAD[name], with_mean), positions_of(1, 2)
        x = made_of(heads, inside(heads, 1, 2, 2), positions)
        error = (x - heads.decode(heads.encode(x, positions), positions)).double().numpy()
        most = np.zeros(error.shape)
        share = len(heads.mean) // len(heads.widths)
        for head in range(len(heads.mean)):
            bundle, at = divmod(head, share)
            most[:, head] = heads.decoder[bundle, :, at * DIM : (at + 1) * DIM].abs().double().sum(0).numpy() / 2
        assert (np.abs(error) <= 1.01 * most + 1e-4).all()
        assert np.abs(error).max() > 0.1 * most.max()


def test_what_lies_beyond_the_widest_integer_becomes_that_and_does_not_come_round() -> None:
    heads, positions = planted(*SPREAD["two heads together"]), positions_of(1, 1)
    largest = 2 * centers(heads)[:, 0]
    for factor in (1.01, 1.5, 3.0, 257 / 128, 1e4):
        for sign in (-1, 1):
            z = sign * factor * (centers(heads) + 1)[None] * np.ones((1, 1, BLOCK, 1))
            u = unpack(heads.encode(made_of(heads, z, positions), positions), heads.widths)[0].double().numpy()
            assert (u == (largest[:, :, None] if sign > 0 else 0)).all(), (factor, sign)


def test_an_integer_represents_itself_less_half_of_the_largest() -> None:
    one = torch.eye(8)[None]
    heads = PackedHeads((Widths(0, 0, 8),), one, one, torch.zeros(1, 8))
    given = torch.tensor([-9.0, -1.5, -1.01, -0.99, -0.01, 0.01, 0.99, 1.01])
    back = heads.decode(heads.encode(given.expand(1, 1, BLOCK, 8), positions_of(1, 1)), positions_of(1, 1))
    assert back[0, 0, 5].tolist() == [-1.5, -1.5, -1.5, -0.5, -0.5, 0.5, 0.5, 1.5]


def rotated_part(heads: PackedHeads, positions: Tensor) -> np.ndarray:
    """The rotated mean alone, which `taken_out` includes."""
    return taken_out(heads, positions) - heads.mean.double().numpy()[None, :, None]


@EVERY
@WITH_MEAN
@CASES
def test_logits_inside_the_codes_are_those_of_decoded_heads(
    share: int, widths: tuple[Widths, ...], with_mean: bool, backend: PackedBackend
) -> None:
    heads, positions, rows = planted(share, widths, with_mean, 3), positions_of(2, 2), 3
    packed = heads.encode(made_of(heads, inside(heads, 2, 2, 4), positions), positions)
    q = torch.randn(2, len(heads.mean), rows, DIM, generator=torch.Generator().manual_seed(5))
    x = heads.decode(packed, positions).double().numpy() - rotated_part(heads, positions)
    expected = q.double().numpy() @ x.swapaxes(2, 3)
    queries = heads.queries(q, backend)
    assert queries.shape == (2, len(widths), share * rows, most_coefficients(widths))
    found = backend.logits(packed, widths, queries).unflatten(2, (share, rows)).flatten(1, 2)
    found = found + (q * heads.offset[:, None]).sum(-1, keepdim=True)
    np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=3e-3)
    assert np.abs(expected).max() > 1


@EVERY
@WITH_MEAN
@CASES
def test_sums_inside_the_codes_are_those_of_decoded_heads(
    share: int, widths: tuple[Widths, ...], with_mean: bool, backend: PackedBackend
) -> None:
    heads, positions, rows = planted(share, widths, with_mean, 6), positions_of(2, 2), 3
    packed = heads.encode(made_of(heads, inside(heads, 2, 2, 7), positions), positions)
    a = torch.rand(2, len(heads.mean), rows, 2 * BLOCK, generator=torch.Generator().manual_seed(8)) / 20
    exact = a.double().numpy()
    expected = exact @ heads.decode(packed, positions).double().numpy()
    sums = backend.sums(packed, widths, a.unflatten(1, (-1, share)).flatten(2, 3))
    found = heads.expanded(sums, backend)
    assert found.shape == (2, len(heads.mean), rows, DIM)
    found = found + heads.offset[:, None] * a.sum(-1, keepdim=True)
    np.testing.assert_allclose(found.numpy() + exact @ rotated_part(heads, positions), expected, rtol=0, atol=3e-3)
    assert np.abs(expected).max() > 0.5


@CASES
def test_the_offset_is_what_integers_of_zero_stand_for(share: int, widths: tuple[Widths, ...]) -> None:
    heads, positions = planted(share, widths), positions_of(1, 1)
    zeros = torch.zeros(1, 1, sum(w.nbytes for w in widths), dtype=torch.uint8)
    expected = heads.decode(zeros, positions)
    torch.testing.assert_close(heads.offset[None, :, None].expand_as(expected), expected, rtol=1e-5, atol=1e-4)


def test_both_backends_ask_the_same_heads_in_turn() -> None:
    """Decoders that are stored for one backend are not given to the other."""
    heads, share = planted(*SPREAD["two heads together"]), 2
    generator = torch.Generator().manual_seed(12)
    q = torch.randn(2, 4, 3, DIM, generator=generator)
    sums = torch.randn(2, 2, 3 * share, 32, generator=generator)
    assert CPU.planes is not None
    for _ in range(2):
        plain, planes = heads.queries(q, REFERENCE), heads.queries(q, CPU)
        torch.testing.assert_close(planes, plain @ CPU.planes(heads.widths), rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(
            heads.expanded(sums, CPU), heads.expanded(sums @ CPU.planes(heads.widths).mT, REFERENCE), rtol=1e-4, atol=1e-3
        )


def test_heads_in_16_bits_are_encoded_as_in_32() -> None:
    heads, positions = planted(*SPREAD["two heads together"], True), positions_of(1, 1)
    x = made_of(heads, inside(heads, 1, 1, 11), positions).bfloat16()
    assert torch.equal(heads.encode(x, positions), heads.encode(x.float(), positions))


def test_no_block_is_no_byte_and_no_token() -> None:
    heads = planted(*SPREAD["fewer than numbers"], True)
    packed = heads.encode(torch.empty(2, len(heads.mean), 0, DIM), torch.empty(2, 0, dtype=torch.int64))
    assert packed.shape == (2, 0, BLOCK * heads.bits // 8)
    assert heads.decode(packed, torch.empty(2, 0, dtype=torch.int64)).shape == (2, len(heads.mean), 0, DIM)


def test_everything_that_is_held_is_named_and_moves() -> None:
    plain, rotated_mean = (planted(*SPREAD["fewer than numbers"], with_mean) for with_mean in (False, True))
    assert plain.bits == 8 * 8 + 4 * 8 + 2 * 8 + 4 * 16 + 2 * 8
    numbers = 2 * 3 * 24 * 2 * DIM + 6 * DIM
    assert sum(t.nbytes for t in plain.tensors()) == 4 * numbers
    assert sum(t.nbytes for t in rotated_mean.tensors()) == 4 * numbers + 4 * 6 * DIM + 8 * 5
    moved = rotated_mean.to("meta")
    assert {t.device.type for t in moved.tensors()} == {"meta"} and moved.widths == rotated_mean.widths
    assert plain.to("cpu").rotated_mean is None


def test_heads_of_another_number_or_width_are_refused() -> None:
    heads = planted(1, (Widths(8, 0, 0),) * 2)
    heads.require(torch.zeros(3, 2, 0, DIM), 5)
    for shape, says in (
        ((1, 1, 4, DIM), "layer 5: the cache has 1 heads of 16"),
        ((1, 2, 4, 8), "layer 5: the cache has 2 heads of 8"),
    ):
        with pytest.raises(CodecError, match=f"{says} numbers, the codec expects 2 of 16. It was fitted on another model"):
            heads.require(torch.zeros(shape), 5)


def test_six_bits_in_two_digits_are_what_six_bits_at_once_would_be() -> None:
    """8 coefficients of 6 bits beside 8 of 4 and 8 of 2: the integers that NumPy quantizes to are those of both digits."""
    rng = np.random.default_rng(4)
    basis = np.linalg.qr(rng.normal(size=(24, 24)))[0]
    steps = np.geomspace(0.02, 0.3, 24)[:, None]
    plain, six, low = (slice(8 * i, 8 * i + 8) for i in (0, 1, 2))  # of 4, of 6 and of 2 bits
    encoder = np.concatenate([(basis.T / steps)[s] for s in (plain, six, six, low)])
    decoder = np.concatenate([(basis.T * steps)[s] * place for s, place in ((plain, 1), (six, 4), (six, 1), (low, 1))])
    heads = PackedHeads(
        (Widths(0, 16, 16),), torch.from_numpy(encoder)[None].float(), torch.from_numpy(decoder)[None].float(),
        torch.zeros(1, 24), six=(8,),
    )  # fmt: skip
    levels = np.repeat([16, 64, 4], 8)
    wanted = rng.integers(0, levels, (2 * BLOCK, 24))
    wanted[0], wanted[1] = 0, levels - 1
    z = wanted - (levels - 1) / 2 + rng.uniform(-0.45, 0.45, wanted.shape)
    z[2], z[3] = -1e4, 1e4  # beyond the widest: saturated, not wrapped around
    wanted[2], wanted[3] = 0, levels - 1
    x = torch.from_numpy(z @ (basis.T * steps)).float()[None, None]
    packed = heads.encode(x, positions_of(1, 2))
    u = unpack(packed, heads.widths)[0, 0].long().mT.numpy()
    assert np.array_equal(u[:, :8], wanted[:, plain]) and np.array_equal(u[:, 24:], wanted[:, low])
    assert np.array_equal(4 * u[:, 8:16] + u[:, 16:24], wanted[:, six])
    back = heads.decode(packed, positions_of(1, 2))[0, 0].double().numpy()
    np.testing.assert_allclose(back, (wanted - (levels - 1) / 2) @ (basis.T * steps), rtol=0, atol=1e-4)
    assert heads.to("cpu").six == (8,)
