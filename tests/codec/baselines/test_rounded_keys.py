"""Rounded keys are one byte per number; the error is that of the format; a mean that is taken out comes back exactly."""

import pytest
import torch

from eigencache.codec.baselines.rounded_keys import KINDS, RoundedKeys
from eigencache.errors import CodecError
from eigencache.spectral.rope import Rotation, rotate

BATCH, HEADS, SEQ, DIM = 2, 3, 21, 16
ROTATION = Rotation(10_000.0 ** -(torch.arange(DIM // 2, dtype=torch.float64) / (DIM // 2)), 1.0, "half")


def drawn(seed: int = 0) -> torch.Tensor:
    return torch.randn(BATCH, HEADS, SEQ, DIM, generator=torch.Generator().manual_seed(seed))


def around(x: torch.Tensor, codec: RoundedKeys, start: int = 0) -> torch.Tensor:
    return codec.decode(codec.encode({4: (x, x)}, start))[4][0]


@pytest.mark.parametrize("kind", KINDS)
def test_a_key_is_one_byte_per_number_and_a_value_two(kind) -> None:
    encoded = RoundedKeys("k", kind, torch.float32).encode({4: (drawn(), drawn(1))}, 0)
    numbers = BATCH * HEADS * SEQ * DIM
    scales = 4 * BATCH if kind == "fp8" else 2 * BATCH * HEADS * SEQ
    assert encoded.nbytes == numbers + scales + 2 * numbers
    assert encoded.tensors["4.codes"].element_size() == 1
    assert all(len(tensor) == BATCH for tensor in encoded.tensors.values())
    assert encoded.select(torch.tensor([1])).tensors["4.codes"].shape[0] == 1


def test_int8_errs_by_half_a_step_of_its_token_and_head_and_clips_nothing() -> None:
    x = drawn() * torch.logspace(-6, 3, SEQ)[:, None]
    step = x.abs().amax(-1, keepdim=True) / 127
    error = (around(x, RoundedKeys("k", "int8", torch.float32)) - x).abs()
    assert (error <= 0.5 * step * (1 + 2**-9) + 127 * 2**-24).all()


def test_fp8_errs_by_a_sixteenth_of_each_number_or_by_its_smallest_step() -> None:
    x = drawn()
    smallest = x.abs().amax((1, 2, 3), keepdim=True) / 448 * 2**-9
    error = (around(x, RoundedKeys("k", "fp8", torch.float32)) - x).abs()
    assert (error <= torch.maximum(x.abs() * (2**-4 + 1e-6), 0.5 * smallest * (1 + 1e-6))).all()


@pytest.mark.parametrize("kind", KINDS)
def test_zero_keys_come_back_as_zero_and_the_dtype_is_the_models(kind) -> None:
    zero = torch.zeros(BATCH, HEADS, SEQ, DIM, dtype=torch.bfloat16)
    found = around(zero, RoundedKeys("k", kind, torch.bfloat16))
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, zero)


@pytest.mark.parametrize("kind", KINDS)
def test_a_mean_before_rotation_is_taken_out_at_its_positions_and_comes_back(kind) -> None:
    mean, start = 50 * torch.randn(HEADS, DIM, generator=torch.Generator().manual_seed(3)), 5
    keys = mean[None, :, None].expand(BATCH, -1, SEQ, -1) + 0.01 * drawn()
    keys = rotate(keys, ROTATION.angles(torch.arange(start, start + SEQ)), "half")
    plain = RoundedKeys("k", kind, torch.float32)
    out = RoundedKeys("k", kind, torch.float32, {4: mean}, {4: ROTATION})
    assert (around(keys, out, start) - keys).abs().max() < 0.005
    assert (around(keys, plain, start) - keys).abs().max() > 0.1
    assert (around(keys, out, start + 1) - keys).abs().max() > 0.1  # at other positions, the mean is another
    assert (out.nbytes, plain.nbytes) == (4 * HEADS * DIM, 0)


@pytest.mark.parametrize("kind", KINDS)
def test_nan_and_means_of_another_model_are_refused(kind) -> None:
    x = drawn()
    with pytest.raises(CodecError, match="means of this model"):
        around(x, RoundedKeys("k", kind, torch.float32, {4: torch.zeros(HEADS + 1, DIM)}))
    x[0, 0, 0, 0] = torch.nan
    with pytest.raises(CodecError, match="keys of layer 4 hold NaN"):
        around(x, RoundedKeys("k", kind, torch.float32))
