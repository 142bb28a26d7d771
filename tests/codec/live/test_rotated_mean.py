"""The mean before rotation is rotated as keys are, and its logits per block equal those of every token."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from eigencache.codec.live.rotated_mean import KeyMean
from eigencache.kernels.packed.format import BLOCK
from eigencache.spectral.rope import PAIRINGS, Pairing, Rotation, rotate

HEADS, PAIRS, DIM = 3, 6, 16  # 12 of 16 numbers are rotated
WITHOUT = (1, 4)  # pairs in which no head has a mean
SCALE = 1.3


def places(pairing: Pairing, pair: int) -> tuple[int, int]:
    """Indices of a pair's two numbers before rotation."""
    return (pair, pair + PAIRS) if pairing == "half" else (2 * pair, 2 * pair + 1)


def planted(pairing: Pairing, seed: int = 0) -> KeyMean:
    """Pair 2 has a mean in the last head only, and pair 5 in its second number only."""
    mean = torch.zeros(HEADS, DIM)
    drawn = 5 * torch.randn(HEADS, PAIRS, 2, generator=torch.Generator().manual_seed(seed))
    drawn[:, list(WITHOUT)] = 0
    drawn[:2, 2] = 0
    drawn[:, 5, 0] = 0
    for pair in range(PAIRS):
        mean[:, places(pairing, pair)] = drawn[:, pair]
    frequencies = 1000.0 ** (-torch.arange(PAIRS, dtype=torch.float64) / PAIRS)
    return KeyMean(mean, Rotation(frequencies, SCALE, pairing))


def expected_mean(key_mean: KeyMean, positions: np.ndarray) -> np.ndarray:
    """R_n μ [batch, heads, tokens, dim] at positions [batch, tokens] with complex numbers, one pair at a time."""
    pairing, mean = key_mean.rotation.pairing, key_mean.mean.double().numpy()
    found = np.zeros((len(positions), HEADS, positions.shape[1], DIM))
    for pair, frequency in enumerate(key_mean.rotation.frequencies.tolist()):
        first, second = places(pairing, pair)
        z = (mean[:, first] + 1j * mean[:, second])[None, :, None] * np.exp(1j * frequency * positions)[:, None] * SCALE
        first, second = (2 * pair, 2 * pair + 1) if pairing == "interleaved" else (pair, pair + PAIRS)
        found[..., first], found[..., second] = z.real, z.imag
    return found


def of_blocks(starts: Tensor) -> np.ndarray:
    """Positions [batch, 64 · blocks]."""
    return (starts.numpy()[..., None] + np.arange(BLOCK)).reshape(len(starts), -1)


@pytest.mark.parametrize("pairing", PAIRINGS)
def test_it_is_the_mean_rotated_to_every_position_of_every_row(pairing: Pairing) -> None:
    key_mean = planted(pairing)
    positions = torch.tensor([[0, 1, 2, 7, 63, 64], [-5, 1000, 3, 131_072, 12, -1]])
    found = key_mean.rotated_to(positions)
    assert found.dtype == torch.float32 and found.shape == (2, HEADS, 6, DIM)
    np.testing.assert_allclose(found.numpy(), expected_mean(key_mean, positions.numpy()), rtol=0, atol=1e-5)
    for row, own in zip(found, positions, strict=True):
        means = key_mean.mean[None, :, None].expand(1, HEADS, len(own), DIM)
        assert torch.equal(row[None], rotate(means, key_mean.rotation.angles(own), pairing))
    assert not found[..., 2 * PAIRS :].any()


@pytest.mark.parametrize("pairing", PAIRINGS)
def test_logits_are_those_of_every_token(pairing: Pairing) -> None:
    key_mean = planted(pairing, 1)
    q = torch.randn(2, HEADS, 5, DIM, generator=torch.Generator().manual_seed(2))
    starts = torch.tensor([[0, 64, 128], [-37, 27, 131_072]])
    found = key_mean.logits(q, starts)
    assert found.dtype == torch.float32 and found.shape == (2, HEADS, 5, 3 * BLOCK)
    expected = q.double().numpy() @ expected_mean(key_mean, of_blocks(starts)).swapaxes(2, 3)
    np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=5e-5)
    assert np.abs(expected).max() > 10


@settings(derandomize=True, deadline=None, max_examples=40)
@given(
    st.sampled_from(PAIRINGS), st.integers(1, 2), st.integers(0, 3), st.integers(1, 4), st.integers(0, 2**31),
    st.sampled_from([torch.float32, torch.bfloat16]),
)  # fmt: skip
def test_logits_agree_wherever_blocks_begin(pairing, batch, blocks, rows, seed, dtype) -> None:
    key_mean, generator = planted(pairing, seed), torch.Generator().manual_seed(seed)
    starts = torch.randint(-200, 40_000, (batch, blocks), generator=generator)
    q = torch.randn(batch, HEADS, rows, DIM, generator=generator).to(dtype)
    expected = q.double() @ torch.from_numpy(expected_mean(key_mean, of_blocks(starts))).mT
    torch.testing.assert_close(key_mean.logits(q, starts).double(), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("pairing", PAIRINGS)
def test_pairs_without_a_mean_are_left_out_and_change_nothing(pairing: Pairing) -> None:
    key_mean = planted(pairing)
    frequencies, first, second, table, used = key_mean._prepared
    assert used.tolist() == [0, 2, 3, 5] and torch.equal(frequencies, key_mean.rotation.frequencies[used])
    assert first.shape == second.shape == (HEADS, 1, 4) and table.shape == (8, BLOCK)
    none = KeyMean(torch.zeros(HEADS, DIM), key_mean.rotation)
    q, starts = torch.ones(1, HEADS, 2, DIM), torch.tensor([[3, 67]])
    assert none._prepared[-1].tolist() == [] and not none.rotated_to(starts).any()
    assert none.logits(q, starts).shape == (1, HEADS, 2, 2 * BLOCK) and not none.logits(q, starts).any()


def test_one_pair_is_a_wave_of_its_frequency() -> None:
    mean = torch.zeros(1, 4)
    mean[0, 1] = 3.0  # first number of pair 1 of two halves
    key_mean = KeyMean(mean, Rotation(torch.tensor([1.0, 0.25], dtype=torch.float64), 2.0, "half"))
    q = torch.tensor([[[[0.0, 1.0, 0.0, 0.0], [0.0, 0.0, 0.0, 1.0], [9.0, 0.0, 9.0, 0.0]]]])
    n = 10 + np.arange(BLOCK)
    found = key_mean.logits(q, torch.tensor([[10]]))[0, 0].numpy()
    np.testing.assert_allclose(found, [6 * np.cos(n / 4), 6 * np.sin(n / 4), 0 * n], rtol=0, atol=1e-5)


def test_everything_that_is_held_moves_to_another_device() -> None:
    key_mean = planted("split")
    assert [t.nbytes for t in key_mean.tensors()] == [4 * HEADS * DIM, 8 * PAIRS]
    moved = key_mean.to("meta")
    assert {t.device.type for t in moved.tensors()} == {"meta"}
    assert (moved.rotation.scale, moved.rotation.pairing) == (SCALE, "split")
    again = key_mean.to(torch.device("cpu"))
    assert all(torch.equal(a, b) for a, b in zip(key_mean.tensors(), again.tensors(), strict=True))
