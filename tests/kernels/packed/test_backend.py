"""Packed blocks have the documented format, and every backend reads them as NumPy does in float64, for any widths."""

from collections.abc import Iterator
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from eigencache.kernels.packed import backend, vnni
from eigencache.kernels.packed.backend import CPU, REFERENCE, VNNI, PackedBackend, packed_backend
from eigencache.kernels.packed.format import BLOCK, Widths, largest_integers, most_coefficients, pack, unpack

COMPILED = (CPU, VNNI) if vnni.unavailable() is None else (CPU,)
EVERY = pytest.mark.parametrize("backend", (REFERENCE, *COMPILED), ids=lambda backend: backend.name)
COUNTS = st.sampled_from([0, 8, 16, 24])
WIDTHS = st.lists(st.builds(Widths, COUNTS, COUNTS, COUNTS), min_size=1, max_size=3).map(tuple)
MIXED = (Widths(8, 16, 8), Widths(0, 0, 24), Widths(16, 8, 0))
FLOAT32 = 2.0**-24


def drawn_codes(widths: tuple[Widths, ...], batch: int, blocks: int, seed: int) -> Tensor:
    """Return random integers that include the smallest and the largest; zeros beyond the last coefficient of a bundle."""
    rng = np.random.default_rng(seed)
    codes = np.zeros((batch, len(widths), most_coefficients(widths), BLOCK * blocks), np.uint8)
    for i, w in enumerate(widths):
        for c, bits in enumerate([8] * w.eight + [4] * w.four + [2] * w.two):
            codes[:, i, c] = rng.integers(0, 2**bits, codes[:, i, c].shape)
            codes[:, i, c, :1], codes[:, i, c, 1:2] = 0, 2**bits - 1
    return torch.from_numpy(codes)


def plainly_packed(codes: np.ndarray, widths: tuple[Widths, ...]) -> np.ndarray:
    """Pack integers by the description of the format, one byte at a time."""
    batch, _, _, tokens = codes.shape
    rows = []
    for b in range(batch):
        for block in range(tokens // BLOCK):
            row: list[int] = []
            for i, w in enumerate(widths):
                own, first = codes[b, i, :, BLOCK * block : BLOCK * (block + 1)].astype(int), 0
                for count, bits in ((w.eight, 8), (w.four, 4), (w.two, 2)):
                    bytes_of_a_token = count * bits // 8
                    for at in range(bytes_of_a_token):
                        shared = range(at, count, bytes_of_a_token)
                        row += [sum(own[first + c, t] << (bits * k) for k, c in enumerate(shared)) for t in range(BLOCK)]
                    first += count
            rows.append(row)
    return np.array(rows, np.uint8).reshape(batch, tokens // BLOCK, -1)


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def logits_of(backend: PackedBackend, packed: Tensor, widths: tuple[Widths, ...], q: Tensor) -> Tensor:
    """Return logits of queries in coefficients, converted to planes where a backend needs them."""
    return backend.logits(packed, widths, q if backend.planes is None else q @ backend.planes(widths))


def sums_of(backend: PackedBackend, packed: Tensor, widths: tuple[Widths, ...], a: Tensor) -> Tensor:
    found = backend.sums(packed, widths, a)
    return found if backend.planes is None else found @ backend.planes(widths).mT


def errors(backend: PackedBackend, codes: Tensor, packed: Tensor, widths: tuple[Widths, ...], rows: int, seed: int):
    """Return the largest errors of logits and sums against float64, and the magnitude of their terms."""
    batch, bundles, most, tokens = codes.shape
    q, a = drawn(batch, bundles, rows, most, seed=seed), drawn(batch, bundles, rows, tokens, seed=seed).softmax(-1)
    logits, sums = logits_of(backend, packed, widths, q), sums_of(backend, packed, widths, a)
    assert (logits.dtype, logits.shape) == (torch.float32, (batch, bundles, rows, tokens))
    assert (sums.dtype, sums.shape) == (torch.float32, (batch, bundles, rows, most))
    x = codes.double().numpy()
    right = q.double().numpy() @ x, a.double().numpy() @ x.swapaxes(2, 3)
    found = [np.abs(y.double().numpy() - z).max(initial=0) for y, z in zip((logits, sums), right, strict=True)]
    return found, [256 * float(q.abs().sum(-1).amax()) if most else 0.0, 256.0]


@settings(derandomize=True, deadline=None, max_examples=60)
@given(WIDTHS, st.integers(1, 2), st.integers(0, 5), st.integers(0, 2**32 - 1))
def test_integers_come_back_from_bytes_that_are_where_the_format_says(widths, batch, blocks, seed) -> None:
    codes = drawn_codes(widths, batch, blocks, seed)
    packed = pack(codes, widths)
    assert packed.dtype == torch.uint8 and packed.shape == (batch, blocks, sum(w.nbytes for w in widths))
    assert sum(w.nbytes for w in widths) * 8 == BLOCK * sum(8 * w.eight + 4 * w.four + 2 * w.two for w in widths)
    if packed.numel():
        assert np.array_equal(packed.numpy(), plainly_packed(codes.numpy(), widths))
    assert torch.equal(unpack(packed, widths), codes)


def test_a_byte_worked_out_by_hand() -> None:
    widths = (Widths(8, 8, 8), Widths(0, 8, 0))
    codes = torch.zeros(1, 2, 24, 2 * BLOCK, dtype=torch.uint8)
    block, token = 1, 5
    codes[0, 0, 2, BLOCK * block + token] = 200
    codes[0, 0, 8 + 1, BLOCK * block + token] = 0x6  # with coefficient 1 + 4 in one byte
    codes[0, 0, 8 + 5, BLOCK * block + token] = 0xA
    codes[0, 0, [16 + 1, 16 + 3, 16 + 5, 16 + 7], BLOCK * block + token] = torch.tensor([1, 2, 3, 1], dtype=torch.uint8)
    codes[0, 1, 3, BLOCK * block + token] = 0x9  # of the second bundle, in the low half
    packed = pack(codes, widths)
    assert packed.shape == (1, 2, 64 * (8 + 4 + 2) + 64 * 4)
    expected = {64 * 2: 200, 64 * (8 + 1): 0xA6, 64 * (12 + 1): 0b01111001, 64 * 14 + 64 * 3: 0x09}
    assert {int(at) - token: int(packed[0, block, at]) for at in packed[0, block].nonzero().flatten()} == expected
    assert not packed[0, 0].any()


def test_widths_say_their_sizes() -> None:
    w = Widths(8, 16, 24)
    assert (w.coefficients, w.bits, w.nbytes) == (48, 64 + 64 + 48, 64 * 22)
    assert w.per_coefficient().tolist() == [8] * 8 + [4] * 16 + [2] * 24
    largest = largest_integers((w, Widths(0, 0, 8)))
    assert largest[0].tolist() == [255] * 8 + [15] * 16 + [3] * 24
    assert largest[1].tolist() == [3] * 8 + [0] * 40


@settings(derandomize=True, deadline=None, max_examples=60)
@given(WIDTHS, st.integers(1, 2), st.integers(1, 5), st.integers(1, 9), st.integers(0, 2**32 - 1))
def test_all_backends_are_as_exact_as_float32(widths, batch, blocks, rows, seed) -> None:
    codes = drawn_codes(widths, batch, blocks, seed)
    packed = pack(codes, widths)
    plain, sizes = errors(REFERENCE, codes, packed, widths, rows, seed)
    for built in COMPILED:
        compiled, _ = errors(built, codes, packed, widths, rows, seed)
        for one, other, size in zip(plain, compiled, sizes, strict=True):
            assert one <= 16 * FLOAT32 * size
            assert other <= 2 * one + 4 * FLOAT32 * size


@EVERY
@pytest.mark.parametrize("rows", [1, 64, 65])
def test_more_blocks_than_are_unpacked_at_a_time_are_read_in_their_order(backend: PackedBackend, rows: int) -> None:
    codes = drawn_codes(MIXED, 1, 35, 3)
    found, sizes = errors(backend, codes, pack(codes, MIXED), MIXED, rows, 3)
    assert all(error <= 16 * FLOAT32 * size for error, size in zip(found, sizes, strict=True))


@EVERY
def test_a_bundle_without_a_coefficient_gives_zeros_and_leaves_the_others(backend: PackedBackend) -> None:
    none = Widths(0, 0, 0)
    for widths in ((none, *MIXED), (*MIXED, none), (MIXED[0], none, MIXED[1]), (none,), (none, none)):
        codes = drawn_codes(widths, 2, 2, 1)
        packed = pack(codes, widths)
        found, sizes = errors(backend, codes, packed, widths, 3, 1)
        assert all(error <= 16 * FLOAT32 * size for error, size in zip(found, sizes, strict=True))
        empty = widths.index(none)
        q, a = drawn(2, len(widths), 3, codes.shape[2], seed=2), drawn(2, len(widths), 3, 2 * BLOCK, seed=2)
        assert not logits_of(backend, packed, widths, q)[:, empty].any()
        assert not sums_of(backend, packed, widths, a)[:, empty].any()


@EVERY
def test_what_a_query_holds_beyond_the_last_coefficient_of_a_bundle_is_not_read(backend: PackedBackend) -> None:
    widths = (Widths(0, 8, 0), Widths(8, 8, 8))
    codes = drawn_codes(widths, 1, 2, 2)
    packed, q = pack(codes, widths), drawn(1, 2, 3, 24, seed=3)
    other = q.clone()
    other[:, 0, :, 8:] = 1e6
    assert torch.equal(logits_of(backend, packed, widths, q), logits_of(backend, packed, widths, other))
    assert not sums_of(backend, packed, widths, drawn(1, 2, 3, 2 * BLOCK, seed=4))[:, 0, :, 8:].any()


@EVERY
def test_no_block_gives_no_logit_and_sums_of_zero(backend: PackedBackend) -> None:
    packed = pack(drawn_codes(MIXED, 2, 0, 0), MIXED)
    most = most_coefficients(MIXED)
    assert logits_of(backend, packed, MIXED, drawn(2, 3, 4, most, seed=0)).shape == (2, 3, 4, 0)
    found = sums_of(backend, packed, MIXED, torch.empty(2, 3, 4, 0))
    assert found.shape == (2, 3, 4, most) and not found.any()


@EVERY
def test_storages_with_room_behind_their_blocks_and_turned_queries_are_read_as_well(backend: PackedBackend) -> None:
    codes, most = drawn_codes(MIXED, 2, 5, 4), most_coefficients(MIXED)
    part = pack(codes, MIXED)[:, :3]
    assert not part.is_contiguous()
    q, a = drawn(2, 3, most, 4, seed=5).mT, drawn(2, 3, 3 * BLOCK, 4, seed=6).mT
    logits, sums = backend.logits(part, MIXED, q), backend.sums(part, MIXED, a)
    assert torch.equal(logits, backend.logits(part.clone(), MIXED, q))
    assert torch.equal(sums, backend.sums(part.clone(), MIXED, a))
    torch.testing.assert_close(logits, backend.logits(part, MIXED, q.contiguous()), rtol=0, atol=1e-2)
    torch.testing.assert_close(sums, backend.sums(part, MIXED, a.contiguous()), rtol=0, atol=1e-1)
    x = codes[..., : 3 * BLOCK].double()
    torch.testing.assert_close(logits_of(backend, part, MIXED, q).double(), q.double() @ x, rtol=0, atol=1e-2)
    torch.testing.assert_close(sums_of(backend, part, MIXED, a).double(), a.double() @ x.mT, rtol=0, atol=1e-1)


@pytest.mark.parametrize("widths", [MIXED, (Widths(0, 0, 32),), (Widths(0, 32, 0), Widths(0, 0, 0))])
def test_planes_make_integers_again(widths: tuple[Widths, ...]) -> None:
    """Read one token at a time: a weight of 1 gives its planes, and the matrix its integers, without rounding."""
    codes = drawn_codes(widths, 1, 1, 13)
    one = torch.eye(BLOCK).expand(1, len(widths), -1, -1)
    assert torch.equal(sums_of(CPU, pack(codes, widths), widths, one), codes.float().mT)
    assert REFERENCE.planes is None


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("backend", COMPILED, ids=lambda backend: backend.name)
@pytest.mark.parametrize("batch", [1, 3])
def test_the_number_of_threads_changes_no_bit(batch: int, backend: PackedBackend) -> None:
    packed, most = pack(drawn_codes(MIXED, batch, 4, 7), MIXED), most_coefficients(MIXED)
    q, a = drawn(batch, 3, 5, most, seed=8), drawn(batch, 3, 5, 4 * BLOCK, seed=9)
    found = []
    for count in (1, 2, 7):
        torch.set_num_threads(count)
        found.append((backend.logits(packed, MIXED, q), backend.sums(packed, MIXED, a)))
    for logits, sums in found[1:]:
        assert torch.equal(logits, found[0][0]) and torch.equal(sums, found[0][1])


@pytest.mark.parametrize(
    ("device", "rows", "compiled", "expected"),
    [
        ("cpu", 1, True, VNNI),
        ("cpu", 9999, True, VNNI),
        ("cpu", 64, False, CPU),
        ("cpu", 65, False, REFERENCE),
        ("mps", 1, True, REFERENCE),
    ],
)
def test_few_queries_on_a_cpu_without_compiled_products_go_to_numba_and_others_to_a_matrix_product(
    device: str, rows: int, compiled: bool, expected: PackedBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend.vnni, "unavailable", lambda: None if compiled else "no such instructions")
    x = SimpleNamespace(device=torch.device(device), requires_grad=False)
    assert packed_backend(x, rows) is expected  # type: ignore[arg-type]


@pytest.mark.parametrize("installed", [True, False])
def test_a_gpu_is_read_by_triton_where_it_is_installed(
    installed: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    backend._warn_once.cache_clear()
    monkeypatch.setattr(backend, "triton_backend", lambda device: f"triton on {device}")
    monkeypatch.setattr(backend, "find_spec", lambda name: name if installed and name == "triton" else None)
    x = SimpleNamespace(device=torch.device("cuda:1"), requires_grad=False)
    for rows in (1, 9999):
        assert packed_backend(x, rows) == ("triton on cuda:1" if installed else REFERENCE)  # type: ignore[arg-type]
    assert ["pip install" in record.getMessage() for record in caplog.records] == [True] * (not installed)
    reasons = backend.unavailable(x.device)
    assert reasons.keys() == {"cpu", "vnni"} | ({"triton"} if not installed else set())
    assert installed or "the package triton is not installed" in reasons["triton"]
    x.requires_grad = True
    assert packed_backend(x, 1) is REFERENCE  # type: ignore[arg-type]


def test_gradients_go_through_plain_pytorch() -> None:
    assert packed_backend(torch.ones(1, requires_grad=True), 1) is REFERENCE
