"""KIVI's keys share scales over 32 tokens, its values over 32 channels; 3 bits per number at 2 bits; the rest is exact."""

import torch

from baseline_caches import cache, numbers_of
from eigencache.codec.baselines.kivi import KIVI, kivi

SHAPES = {0: ((2, 64), (2, 64))}


def test_whole_groups_take_three_and_five_bits() -> None:
    cached = cache(SHAPES, 96)
    for bits, bits_per_value in ((2, 3), (4, 5)):
        assert 8 * KIVI(bits, torch.float32).encode(cached, 0).nbytes == bits_per_value * numbers_of(cached)


def test_the_last_128_tokens_and_keys_that_fill_no_group_are_exact_in_sixteen_bits_and_counted() -> None:
    cached = cache(SHAPES, 64 + 5 + 128, dtype=torch.bfloat16)
    codec = kivi(2, torch.bfloat16)
    encoded = codec.encode(cached, 3)
    keys, values = codec.decode(encoded)[0]
    assert torch.equal(keys[:, :, 64:], cached[0][0][:, :, 64:])
    assert torch.equal(values[:, :, 69:], cached[0][1][:, :, 69:])
    assert not torch.equal(keys[:, :, :64], cached[0][0][:, :, :64])
    assert not torch.equal(values[:, :, 64:69], cached[0][1][:, :, 64:69])
    per_token = 2 * 2 * 64  # rows, heads, numbers of one slot
    in_keys = per_token * (64 * 3 / 8 + 5 * 2)
    in_values = per_token * 69 * 3 / 8
    assert encoded.nbytes == in_keys + in_values + 2 * per_token * 128 * 2


def test_a_wide_channel_of_keys_and_a_wide_token_of_values_spoil_nothing_else() -> None:
    cached = cache(SHAPES, 32)
    quiet = cached[0][0].clone(), cached[0][1].clone()
    cached[0][0][..., 7] *= 1000
    cached[0][1][:, :, 9] *= 1000
    codec = KIVI(4, torch.float32)
    keys, values = codec.decode(codec.encode(cached, 0))[0]
    channels = [i for i in range(64) if i != 7]
    tokens = [i for i in range(32) if i != 9]
    assert (keys - quiet[0])[..., channels].abs().max() < 1.1
    assert (values - quiet[1])[:, :, tokens].abs().max() < 1.1


def test_fewer_tokens_than_a_group_stay_in_sixteen_bits() -> None:
    cached = cache(SHAPES, 31, dtype=torch.float16)
    codec = KIVI(2, torch.float16)
    assert torch.equal(codec.decode(codec.encode(cached, 0))[0][0], cached[0][0])


def test_errors_are_half_a_step_of_the_channel_and_of_the_token() -> None:
    cached = cache(SHAPES, 64)
    codec = KIVI(2, torch.float32)
    encoded = codec.encode(cached, 0)
    keys, values = codec.decode(encoded)[0]
    per_channel = encoded.tensors["0.0.step"].float().repeat_interleave(32, -1).mT
    per_token = encoded.tensors["0.1.step"].float().repeat_interleave(32, -1)
    assert ((keys - cached[0][0]).abs() <= per_channel / 2 + 1e-4).all()
    assert ((values - cached[0][1]).abs() <= per_token / 2 + 1e-4).all()
