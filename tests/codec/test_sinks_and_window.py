"""First and most recent tokens in more bits beside any codec: where they are, what they lose, what they weigh."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from eigencache.codec.base import EncodedBytes, SixteenBit
from eigencache.codec.sinks_and_window import Fp8, WithSinksAndWindow
from eigencache.errors import CodecError
from stub_codecs import Identity, Zeros


def cache(seq: int, batch: int = 2, scale: float = 1.0) -> dict[int, tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seq)
    return {i: tuple(scale * torch.randn(batch, 2, seq, 8, generator=generator) for _ in range(2)) for i in (0, 3)}


def decoded(codec, seq: int, start: int) -> tuple[Tensor, Tensor]:
    """Keys of layer 3, given and decoded."""
    given = cache(seq)
    return given[3][0], codec.decode(codec.encode(given, start))[3][0]


@pytest.mark.parametrize(
    ("seq", "start", "sinks", "window", "roles"),
    [
        (20, 0, 4, 5, ["sinks", "coded", "window"]),
        (20, 2, 4, 5, ["sinks", "coded", "window"]),
        (20, 4, 4, 5, ["coded", "window"]),
        (20, 900, 4, 0, ["coded"]),
        (3, 0, 4, 5, ["sinks"]),
        (6, 0, 4, 5, ["sinks", "window"]),
        (4, 7, 4, 5, ["window"]),
    ],
)
def test_sinks_are_positions_and_the_window_the_last_tokens(seq: int, start: int, sinks: int, window: int, roles) -> None:
    codec = WithSinksAndWindow(Zeros(), torch.float32, sinks, window)
    pieces = codec.encode(cache(seq), start)
    assert [role for role, _ in pieces.parts] == roles and (pieces.start, pieces.tokens) == (start, seq)
    starts = [(part.start, part.tokens) for _, part in pieces.parts]
    assert starts[0][0] == start and all(a + n == b for (a, n), (b, _) in pairwise(starts))
    given, back = decoded(codec, seq, start)
    first = min(seq, max(0, sinks - start))
    last = max(first, seq - window)
    assert torch.equal(back[:, :, :first], given[:, :, :first].half().float())
    assert not back[:, :, first:last].any()
    assert torch.equal(back[:, :, last:], given[:, :, last:].half().float())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_is_kept_in_16_bits_is_exact_for_a_model_that_has_them(dtype: torch.dtype) -> None:
    given = {i: tuple(x.to(dtype) for x in both) for i, both in cache(9).items()}
    codec = WithSinksAndWindow(Identity(), dtype, 4, 3)
    back = codec.decode(codec.encode(given, 0))
    assert all(torch.equal(x, y) and y.dtype == dtype for i in given for x, y in zip(given[i], back[i], strict=True))


def test_all_bytes_are_counted() -> None:
    per_token = 2 * 2 * 2 * 8 * 2  # rows, layers, slots, numbers of both heads
    codec = WithSinksAndWindow(SixteenBit(), torch.float32, 4, 5)
    assert codec.encode(cache(30), 0).nbytes == 2 * per_token * 30
    in_fp8 = WithSinksAndWindow(SixteenBit(), torch.float32, 4, 5, "fp8").encode(cache(30), 0)
    assert in_fp8.nbytes == 2 * per_token * 26 + 4 * (per_token + 2 * per_token // 8)
    assert codec.nbytes == 0 and codec.name == "16 bit"


def test_rows_can_be_chosen_without_decoding() -> None:
    codec = WithSinksAndWindow(Identity(), torch.float32, 4, 3, "fp8")
    encoded = codec.encode(cache(12), 0)
    back = codec.decode(encoded)[0][1]
    assert torch.equal(codec.decode(encoded.select(torch.tensor([1, 0, 1])))[0][1], back[[1, 0, 1]])


def test_fp8_is_within_a_sixteenth_of_a_number_or_of_the_least_step_of_its_head() -> None:
    for scale in (1e-4, 1.0, 1e6):
        given = cache(40, scale=scale)
        back = Fp8(torch.float32).decode(Fp8(torch.float32).encode(given, 0))
        for i, both in given.items():
            for x, y in zip(both, back[i], strict=True):
                least = x.abs().amax(-1, keepdim=True) / 448 * 2**-9 * 1.001 + 2**-24
                assert bool(((x - y).abs() <= torch.maximum(x.abs() / 16 * 1.001, least)).all())


def test_zeros_stay_zero_and_what_fp8_cannot_hold_is_refused() -> None:
    nothing = {0: (torch.zeros(1, 1, 3, 4),) * 2}
    assert not Fp8(torch.float32).decode(Fp8(torch.float32).encode(nothing, 0))[0][0].any()
    for bad in (float("nan"), float("inf"), 1e9):
        with pytest.raises(CodecError, match="layer 0 holds numbers that do not fit"):
            Fp8(torch.float32).encode({0: (torch.full((1, 1, 3, 4), bad),) * 2}, 0)


def test_rows_that_share_a_string_count_once() -> None:
    encoded = EncodedBytes((b"abc", b"defgh"), 0, 1)
    assert encoded.nbytes == 8
    assert encoded.select(torch.tensor([1, 1, 1])).nbytes == 5
