"""A rotation is identified from its table and reproduces it at any position; other tables are refused."""

import hashlib

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from eigencache.spectral.rope import PAIRINGS, Angles, Pairing, Rotation, rope_sha256, rotate, rotation_from, unrotate

FREQUENCIES = 100.0 ** (-torch.arange(4, dtype=torch.float64) / 4)


def table(length: int, scale: float = 1.0, start: int = 0) -> Angles:
    turned = torch.arange(start, start + length, dtype=torch.float64)[:, None] * FREQUENCIES
    return Angles((scale * turned.cos()).float()[None, None], (scale * turned.sin()).float()[None, None])


@pytest.mark.parametrize("scale", [1.0, 1.3])
def test_a_rotation_is_found_from_its_table(scale: float) -> None:
    rotation = rotation_from(table(50, scale), "half")
    assert rotation is not None
    torch.testing.assert_close(rotation.frequencies, FREQUENCIES, rtol=1e-5, atol=1e-6)
    assert rotation.scale == pytest.approx(scale, rel=1e-6)
    late, expected = rotation.angles(torch.arange(500, 510)), table(10, scale, 500)
    torch.testing.assert_close(late.cos, expected.cos, rtol=0, atol=2e-3)


def test_a_table_that_is_no_rotation_is_refused() -> None:
    turned = torch.arange(50, dtype=torch.float64)[:, None].square() * FREQUENCIES
    assert rotation_from(Angles(turned.cos()[None, None], turned.sin()[None, None]), "half") is None


@pytest.mark.parametrize("pairing", PAIRINGS)
@pytest.mark.parametrize("scale", [1.0, 1.3])
def test_unrotating_by_a_found_rotation_is_undone_exactly_by_rotating(pairing: Pairing, scale: float) -> None:
    rotation = Rotation(FREQUENCIES, scale, pairing)
    x = torch.randn(2, 3, 40, 10, generator=torch.Generator().manual_seed(0))
    angles = rotation.angles(torch.arange(40))
    torch.testing.assert_close(rotate(unrotate(x, angles, pairing), angles, pairing), x, rtol=1e-5, atol=1e-5)


def of_theta(theta: float, pairs: int, scale: float = 1.0, pairing: Pairing = "half") -> Rotation:
    return Rotation(theta ** (-torch.arange(pairs, dtype=torch.float64) / pairs), scale, pairing)


@settings(derandomize=True, deadline=None, max_examples=100)
@given(
    st.floats(100, 1e7), st.sampled_from([4, 16, 32, 64]), st.floats(1, 1.5), st.sampled_from(PAIRINGS),
    st.integers(0, 2**31), st.floats(1.5, 100),
)  # fmt: skip
def test_the_hash_is_deaf_to_rounding_and_hears_every_other_rotation(theta, pairs, scale, pairing, seed, factor) -> None:
    one = of_theta(theta, pairs, scale, pairing)
    steps = 16 * torch.cat([one.frequencies, torch.tensor([scale])]).log2()
    assume(((steps - steps.floor() - 0.5).abs() > 1e-3).all())  # no value is at the boundary of a step
    noise = 1 + 1e-6 * (2 * torch.rand(pairs, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) - 1)
    rounded = Rotation(one.frequencies * noise, scale * (1 - 1e-6), pairing)
    assert rope_sha256({0: one, 3: one}) == rope_sha256({3: rounded, 0: rounded})
    others = [
        {0: of_theta(theta * factor, pairs, scale, pairing)},
        {0: Rotation(one.frequencies / factor, scale, pairing)},
        {0: of_theta(theta, pairs, scale * factor, pairing)},
        {0: Rotation(one.frequencies[:-1], scale, pairing)},
        *({0: Rotation(one.frequencies, scale, other)} for other in PAIRINGS if other != pairing),
        {1: one},
        {0: one, 1: one},
        {},
    ]
    assert len({rope_sha256(rotations) for rotations in ({0: one}, *others)}) == len(others) + 1


def test_pairs_that_never_turn_and_turn_backward_have_hashes_of_their_own() -> None:
    frequencies = torch.tensor([1.0, 0.5, 0.25, 0.0], dtype=torch.float64)
    changes = torch.tensor([[1, 1, 1, 1], [1, 1, -1, 1], [1, 1, 0, 1]])
    assert len({rope_sha256({0: Rotation(frequencies * change, 1.0, "half")}) for change in changes}) == 3


def test_the_hash_of_a_rotation_is_the_same_on_every_machine_and_in_every_version() -> None:
    rotation = Rotation(torch.tensor([1.0, 0.1, 0.01], dtype=torch.float64), 1.0, "half")
    assert rope_sha256({4: rotation}) == hashlib.sha256(b"4 half +0 +0 +-53 +-106\n").hexdigest()
