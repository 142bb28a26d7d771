"""Integers per token and head take 8.5 and 4.5 bits per number in groups of 64, and err by half a step."""

import pytest
import torch

from baseline_caches import cache, numbers_of
from eigencache.codec.baselines.integers import Integers


@pytest.mark.parametrize(("bits", "bits_per_value"), [(8, 8.5), (4, 4.5)])
def test_a_head_of_128_takes_the_bits_it_should(bits, bits_per_value) -> None:
    cached = cache({0: ((2, 128), (2, 128))})
    codec = Integers(bits, torch.float32)
    encoded = codec.encode(cached, 0)
    assert codec.name == f"int{bits}"
    assert codec.nbytes == 0
    assert 8 * encoded.nbytes == bits_per_value * numbers_of(cached)


@pytest.mark.parametrize("width", [20, 64, 96])
def test_every_number_is_within_half_a_step_of_its_group(width: int) -> None:
    cached = cache({3: ((2, width), (1, 8))}, 11)
    encoded = Integers(4, torch.float32).encode(cached, 0)
    decoded = Integers(4, torch.float32).decode(encoded)
    for slot, x in enumerate(cached[3]):
        group = min(64, x.shape[-1])
        steps = encoded.tensors[f"3.{slot}.step"].float().repeat_interleave(group, -1)[..., : x.shape[-1]]
        assert ((decoded[3][slot] - x).abs() <= steps / 2 + 1e-4).all()


def test_tokens_and_heads_have_scales_of_their_own() -> None:
    cached = cache({0: ((2, 32), (2, 32))}, 5)
    cached[0][0][:, 0, 2] *= 1000
    decoded = Integers(8, torch.float32).decode(Integers(8, torch.float32).encode(cached, 0))
    error = (decoded[0][0] - cached[0][0]).abs().amax(-1)
    assert (error[:, 1] < 0.1).all() and (error[:, 0, [0, 1, 3, 4]] < 0.1).all()
