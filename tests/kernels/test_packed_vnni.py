"""Attention in one pass is softmax over everything, whatever the tiles, parts and storages; NaN stays NaN."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from eigencache.kernels import packed_vnni
from eigencache.kernels.reference import BLOCK, Widths, most_coefficients, unpack

needs_vnni = pytest.mark.skipif(not packed_vnni.available(), reason="no AVX-512 VNNI, or no C compiler")
KEYS = (Widths(8, 16, 8), Widths(0, 0, 24), Widths(16, 8, 0))
VALUES = (Widths(0, 24, 0), Widths(8, 0, 8), Widths(0, 8, 16))


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def storages(widths: tuple[Widths, ...], batch: int, filled: list[int], seed: int) -> list[Tensor]:
    """Random bytes, with room behind those that are filled."""
    generator = torch.Generator().manual_seed(seed)
    size = sum(w.nbytes for w in widths)
    whole = [torch.randint(256, (batch, n + 2, size), generator=generator, dtype=torch.uint8) for n in filled]
    return [x[:, :n] for x, n in zip(whole, filled, strict=True)]


def planted(keys: list[Tensor], values: list[Tensor], q: Tensor, extra: Tensor | None) -> tuple[Tensor, Tensor]:
    """Log-sum-exp and output of softmax in float64, over all tokens at once."""
    k, v = (torch.cat([unpack(x, w) for x in xs], -1).double() for xs, w in ((keys, KEYS), (values, VALUES)))
    logits = q.double() @ k + (0 if extra is None else extra.double())
    return logits.logsumexp(-1), logits.softmax(-1) @ v.mT


@needs_vnni
@settings(derandomize=True, deadline=None, max_examples=40)
@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=3),
    st.integers(1, 2),
    st.integers(1, 9),
    st.booleans(),
    st.sampled_from([1, 2, 5, 16]),
    st.integers(0, 2**32 - 1),
)
def test_attention_in_one_pass_is_softmax_over_all_storages(filled, batch, rows, with_extra, threads, seed) -> None:
    torch.set_num_threads(threads)  # 16 are more than there are bundles: storages are cut
    keys, values = storages(KEYS, batch, filled, seed), storages(VALUES, batch, filled, seed + 1)
    q = 0.02 * drawn(batch, 3, rows, most_coefficients(KEYS), seed=seed)
    extra = drawn(batch, 3, rows, BLOCK * sum(filled), seed=seed + 2) if with_extra else None
    top, total, sums = packed_vnni.attention(keys, values, (KEYS, VALUES), q, extra)
    lse, out = planted(keys, values, q, extra)
    torch.testing.assert_close(top.double() + total.double().log(), lse, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close((sums / total[..., None]).double(), out, rtol=1e-4, atol=0.01)
    assert bool((total >= 0.999).all())  # relative to the largest logit


@needs_vnni
def test_one_weight_of_many_orders_more_leaves_the_small_ones_what_they_are() -> None:
    """A token that takes half of the weight among 4,096 that share the rest: their digits are of the same tile."""
    widths = (Widths(0, 8, 0),)
    packed = torch.zeros(1, 64, widths[0].nbytes, dtype=torch.uint8)
    values = torch.full_like(packed, 0x11)
    values[0, 3, 5], values[0, 3, BLOCK + 5] = 0xFF, 0xFF
    extra = torch.zeros(1, 1, 1, 64 * BLOCK)
    extra[..., 3 * BLOCK + 5] = torch.tensor(64.0 * BLOCK - 1).log()
    q = torch.zeros(1, 1, 1, 8)
    _, total, sums = packed_vnni.attention([packed], [values], (widths, widths), q, extra)
    shared = (sums / total[..., None]).flatten()
    assert shared.tolist() == pytest.approx([8.0, 8.0, 1, 1, 8.0, 8.0, 1, 1], rel=2e-4)


@needs_vnni
def test_what_is_masked_by_minus_infinity_has_no_weight_and_a_row_that_sees_nothing_a_sum_of_zero() -> None:
    filled = [17, 3]
    keys, values = storages(KEYS, 1, filled, 1), storages(VALUES, 1, filled, 2)
    q = 0.02 * drawn(1, 3, 2, most_coefficients(KEYS), seed=3)
    extra = torch.zeros(1, 3, 2, 20 * BLOCK)
    extra[:, :, 0, : 18 * BLOCK] = -torch.inf
    extra[:, :, 1] = -torch.inf
    top, total, sums = packed_vnni.attention(keys, values, (KEYS, VALUES), q, extra)
    lse, out = planted(keys, values, q, extra)
    torch.testing.assert_close(top[..., 0].double() + total[..., 0].double().log(), lse[..., 0], rtol=1e-5, atol=1e-4)
    torch.testing.assert_close((sums / total[..., None])[:, :, 0].double(), out[:, :, 0], rtol=1e-4, atol=0.01)
    assert not total[..., 1].any() and not sums[:, :, 1].any() and bool((top[..., 1] == -torch.inf).all())


@needs_vnni
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_numbers_that_are_none_are_not_made_into_some(bad: float) -> None:
    keys, values = storages(KEYS, 1, [2], 1), storages(VALUES, 1, [2], 2)
    q = 0.02 * drawn(1, 3, 5, most_coefficients(KEYS), seed=3)
    q[0, 0, 1, 2] = bad
    _, total, sums = packed_vnni.attention(keys, values, (KEYS, VALUES), q)
    assert not (sums[0, 0, 1] / total[0, 0, 1]).isfinite().any()
    assert bool(sums[0, 0, [0, 2, 3, 4]].isfinite().all()) and bool(sums[0, 1:].isfinite().all())
    assert not packed_vnni.logits(keys[0], KEYS, q)[0, 0, 1].isfinite().any()
    a = drawn(1, 3, 5, 2 * BLOCK, seed=4)
    a[0, 0, 1, 2] = bad
    assert not packed_vnni.sums(values[0], VALUES, a)[0, 0, 1, :24].isfinite().any()


@needs_vnni
def test_weights_and_queries_of_any_size_and_sign_are_as_exact_as_their_largest_number() -> None:
    packed = storages(KEYS, 1, [20], 5)[0]
    u = unpack(packed, KEYS).double()
    for size in (1e-30, 1.0, 1e30):
        q, a = size * drawn(1, 3, 3, u.shape[2], seed=6), size * drawn(1, 3, 3, u.shape[3], seed=7)
        for found, right in (
            (packed_vnni.logits(packed, KEYS, q), q.double() @ u),
            (packed_vnni.sums(packed, KEYS, a), a.double() @ u.mT),
        ):
            assert float((found.double() - right).abs().max() / right.abs().max()) < 1e-5


def availability(tmp_path: Path, **changed: str) -> str:
    """What a new process says."""
    code = "from eigencache.kernels.packed import packed_backend; import torch; print(packed_backend(torch.ones(1), 1).name)"
    environment = {"PATH": "/usr/bin:/bin", "XDG_CACHE_HOME": str(tmp_path), "HOME": str(tmp_path), **changed}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    return done.stdout.strip()


@needs_vnni
def test_it_is_built_once_and_where_it_cannot_be_built_the_portable_code_is_used(tmp_path: Path) -> None:
    (tmp_path / "none").mkdir()
    none = str(tmp_path / "none")
    assert availability(tmp_path, PATH=none) == "cpu"
    assert availability(tmp_path, CC="/bin/false") == "cpu"
    assert not list((tmp_path / "eigencache").iterdir())
    assert availability(tmp_path) == "vnni"
    (built,) = (tmp_path / "eigencache").iterdir()
    written = built.stat().st_mtime_ns
    assert availability(tmp_path, PATH=none) == "vnni"  # the library is there: no compiler is needed
    assert built.stat().st_mtime_ns == written
    built.write_bytes(b"not a library")
    assert availability(tmp_path, PATH=none) == "cpu"
