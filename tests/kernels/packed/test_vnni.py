"""Attention in one pass is softmax over everything, whatever the tiles, parts and storages; NaN stays NaN."""

import math
from collections.abc import Iterator
from dataclasses import fields

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from eigencache.kernels.packed import reference, vnni
from eigencache.kernels.packed.format import BLOCK, Widths, most_coefficients, unpack
from eigencache.kernels.packed.reference import AttentionQueries, PackedStorage, RotatedMeanLogits

needs_vnni = pytest.mark.skipif(vnni.unavailable() is not None, reason=f"not here: {vnni.unavailable()}")
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
    """Return chunks of random bytes, with room behind those that are filled."""
    generator = torch.Generator().manual_seed(seed)
    size = sum(w.nbytes for w in widths)
    whole = [torch.randint(256, (batch, n + 2, size), generator=generator, dtype=torch.uint8) for n in filled]
    return [x[:, :n] for x, n in zip(whole, filled, strict=True)]


def doubled(queries: AttentionQueries) -> AttentionQueries:
    """Return the queries in float64."""
    given = {f.name: getattr(queries, f.name) for f in fields(queries)}
    mean = queries.rotated_mean and RotatedMeanLogits(*(x.double() for x in vars(queries.rotated_mean).values()))
    given = {name: x.double() if isinstance(x, Tensor) else x for name, x in given.items()}
    return AttentionQueries(**given | {"rotated_mean": mean})


def mean_and_lse(found: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    top, total, sums = (x.double() for x in found)
    return sums / total[..., None].clamp_min(1e-300), top + total.log()


def a_rotated_mean(batch: int, rows: int, blocks: int, seed: int) -> RotatedMeanLogits:
    cos, sin = drawn(2, batch, blocks, 4, seed=seed + 1).tanh()
    return RotatedMeanLogits(*drawn(2, batch, 3, rows, 4, seed=seed), cos, sin, drawn(8, BLOCK, seed=seed + 2).tanh())


@needs_vnni
@settings(derandomize=True, deadline=None, max_examples=100)
@given(
    filled=st.lists(st.integers(1, 40), min_size=1, max_size=3),
    batch=st.integers(1, 2),
    rows=st.integers(1, 17),
    rotated=st.booleans(),
    latents=st.booleans(),
    ranged=st.booleans(),
    softcap=st.sampled_from([None, 2.0, 50.0]),
    exact=st.booleans(),
    threads=st.sampled_from([1, 2, 5, 16]),  # 16 are more than there are bundles: storages are cut
    seed=st.integers(0, 2**31),
)
def test_attention_in_one_pass_is_softmax_over_all_storages(
    filled, batch, rows, rotated, latents, ranged, softcap, exact, threads, seed
) -> None:  # fmt: skip
    torch.set_num_threads(threads)
    storage = PackedStorage(storages(KEYS, batch, filled, seed), storages(VALUES, batch, filled, seed + 1), (KEYS, VALUES))
    tokens = BLOCK * sum(filled)
    limits = torch.randint(tokens, (2, batch, 1, rows), generator=torch.Generator().manual_seed(seed))
    queries = AttentionQueries(
        0.02 * drawn(batch, 3, rows, most_coefficients(KEYS), seed=seed),
        drawn(batch, 3, rows, seed=seed + 3),
        0.02 * drawn(batch, 3, rows, most_coefficients(VALUES), seed=seed + 4) if latents else None,
        a_rotated_mean(batch, rows, sum(filled), seed + 5) if rotated else None,
        (limits.amin(0), limits.amax(0)) if ranged else None,  # some see nothing
        softcap,
        exact,
    )
    found, right = vnni.attention(storage, queries), reference.attention(storage, doubled(queries))
    seen = right[1] > 0
    assert torch.equal(found[1] > 0, seen) and bool((found[1][seen] >= 0.999).all())  # relative to the largest logit
    assert torch.equal(found[0] == -torch.inf, ~seen) and not found[2][~seen].any()
    for one, other, tolerance in zip(mean_and_lse(found), mean_and_lse(right), (255, 10), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=tolerance * (1e-5 if exact else 2e-3))


@needs_vnni
@pytest.mark.parametrize("sharp", [0.001, 0.05, 0.3])
def test_two_digits_err_less_than_a_model_in_sixteen_bits(sharp: float) -> None:
    """Check the error rule: against float64, at most twice the error of PyTorch in bfloat16; flat and peaked softmax."""
    storage = PackedStorage(storages(KEYS, 2, [30], 8), storages(VALUES, 2, [30], 9), (KEYS, VALUES))
    queries = AttentionQueries((sharp * drawn(2, 3, 8, most_coefficients(KEYS), seed=10)).bfloat16().float(), exact=False)
    right = mean_and_lse(reference.attention(storage, doubled(queries)))[0]
    k, v = (unpack(x[0], w).bfloat16() for x, w in ((storage.keys, KEYS), (storage.values, VALUES)))
    plain = (queries.projected.bfloat16() @ k).float().softmax(-1).bfloat16() @ v.mT
    found = mean_and_lse(vnni.attention(storage, queries))[0]
    errors = [float((x.double() - right).square().mean().sqrt()) for x in (found, plain)]
    assert errors[0] <= 2 * errors[1]


@needs_vnni
@pytest.mark.parametrize(("exact", "tolerance"), [(True, 2e-5), (False, 2e-3)])
def test_one_weight_of_many_orders_more_leaves_the_small_ones_what_they_are(exact: bool, tolerance: float) -> None:
    """One token has half of the weight, 1,023 or 4,095 share the rest, and their digits have one scale per tile."""
    widths = (Widths(8, 8, 0),)
    for blocks in (16, 64):
        keys, values = torch.zeros(2, 1, blocks, widths[0].nbytes, dtype=torch.uint8)
        keys[0, 3, 5] = 255
        values[...] = 0x11
        values[0, 3, torch.arange(5, values.shape[2], BLOCK)] = 0xFF
        q = torch.zeros(1, 1, 1, 16)
        q[..., 0] = math.log(64 * blocks - 1) / 255
        _, total, sums = vnni.attention(PackedStorage([keys], [values], (widths, widths)), AttentionQueries(q, exact=exact))
        found = (sums / total[..., None]).flatten()
        assert found.tolist() == pytest.approx([(255 + 17) / 2] * 8 + [8.0] * 8, rel=tolerance)


@needs_vnni
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_numbers_that_are_none_are_not_made_into_some(bad: float) -> None:
    keys, values = storages(KEYS, 1, [2], 1), storages(VALUES, 1, [2], 2)
    q = 0.02 * drawn(1, 3, 5, most_coefficients(KEYS), seed=3)
    q[0, 0, 1, 2] = bad
    for exact in (True, False):
        _, total, sums = vnni.attention(PackedStorage(keys, values, (KEYS, VALUES)), AttentionQueries(q, exact=exact))
        assert not (sums[0, 0, 1] / total[0, 0, 1]).isfinite().any()
        assert bool(sums[0, 0, [0, 2, 3, 4]].isfinite().all()) and bool(sums[0, 1:].isfinite().all())
    assert not vnni.logits(keys[0], KEYS, q)[0, 0, 1].isfinite().any()
    a = drawn(1, 3, 5, 2 * BLOCK, seed=4)
    a[0, 0, 1, 2] = bad
    assert not vnni.sums(values[0], VALUES, a)[0, 0, 1, :24].isfinite().any()


@needs_vnni
def test_weights_and_queries_of_any_size_and_sign_are_as_exact_as_their_largest_number() -> None:
    packed = storages(KEYS, 1, [20], 5)[0]
    u = unpack(packed, KEYS).double()
    for size in (1e-30, 1.0, 1e30):
        q, a = size * drawn(1, 3, 3, u.shape[2], seed=6), size * drawn(1, 3, 3, u.shape[3], seed=7)
        for found, right in (
            (vnni.logits(packed, KEYS, q), q.double() @ u),
            (vnni.sums(packed, KEYS, a), a.double() @ u.mT),
        ):
            assert float((found.double() - right).abs().max() / right.abs().max()) < 1e-5
