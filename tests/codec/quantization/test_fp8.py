"""fp8 takes one byte per number, errs by at most a sixteenth of it, and saturates at 448."""

import torch

from eigencache.codec.quantization.fp8 import FP8_MAX, from_fp8, to_fp8


def test_a_number_is_one_byte_and_errs_by_a_sixteenth_or_half_the_smallest_step() -> None:
    x = torch.logspace(-4, 2.65, 500)
    codes = to_fp8(x)
    assert codes.dtype == torch.uint8 and codes.shape == x.shape
    assert ((from_fp8(codes) - x).abs() <= torch.maximum(x / 16, torch.tensor(2.0**-10))).all()


def test_magnitudes_beyond_the_largest_saturate() -> None:
    assert from_fp8(to_fp8(torch.tensor([-1e9, FP8_MAX, 449.0]))).tolist() == [-FP8_MAX, FP8_MAX, FP8_MAX]
