"""The Triton kernels of packed blocks, on a GPU or in Triton's interpreter, against float64."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from os import environ
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed: pip install 'eigencache[triton]'")

from eigencache.codec.live.packed_heads import PackedHeads
from eigencache.codec.live.rotated_mean import KeyMean
from eigencache.kernels.packed import reference
from eigencache.kernels.packed.format import (
    BLOCK,
    Widths,
    digit_layout,
    largest_integers,
    most_coefficients,
    pack,
    unpack,
)
from eigencache.kernels.packed.reference import AttentionQueries, PackedStorage, RotatedMean, RotatedMeanLogits
from eigencache.kernels.packed.triton import launch
from eigencache.kernels.packed.triton.encode import encode
from eigencache.kernels.packed.triton.plan import pieces_of, splits_for
from eigencache.spectral.rope import Angles, Rotation, rotate
from triton_process import DEVICE, Run, triton_process

pytestmark = pytest.mark.slow

MIXED = (Widths(8, 16, 8), Widths(0, 0, 24), Widths(16, 8, 0))
OTHER = (Widths(0, 24, 0), Widths(8, 0, 8), Widths(0, 0, 0))
FLOAT32 = 2.0**-24
PAIRED = pytest.mark.parametrize("paired", [True, False], ids=["pairs", "halves"])


@pytest.fixture(scope="module")
def run() -> Iterator[Run]:
    with triton_process() as call:
        yield lambda function, *args, **kwargs: call(called, function, *args, **kwargs)


def called(function: Run, *args: Any, **kwargs: Any) -> Any:
    """Call a function where the kernels run. New tensors are filled with NaN, or the largest integer."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    try:
        return moved(function(*moved(args, DEVICE), **moved(kwargs, DEVICE)), torch.device("cpu"))
    finally:
        torch.use_deterministic_algorithms(False)


def moved(x: Any, device: torch.device) -> Any:
    """Move all tensors inside x to a device, with their strides."""
    if isinstance(x, Tensor):
        return x.to(device)
    if isinstance(x, RotatedMeanLogits | RotatedMean | PackedStorage | AttentionQueries):
        return replace(x, **moved(vars(x), device))
    if isinstance(x, dict):
        return {name: moved(value, device) for name, value in x.items()}
    return type(x)(moved(y, device) for y in x) if type(x) in (list, tuple) and x and not isinstance(x[0], Widths) else x


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def stored(widths: tuple[Widths, ...], batch: int, blocks: Sequence[int], seed: int, room: int = 1) -> list[Tensor]:
    """Return chunks of random bytes with room for `room` more blocks behind theirs, filled with other bytes."""
    generator, size = torch.Generator().manual_seed(seed), sum(w.nbytes for w in widths)
    return [
        torch.randint(0, 256, (batch, count + room, size), dtype=torch.uint8, generator=generator)[:, :count]
        for count in blocks
    ]


def unpacked(chunks: Sequence[Tensor], widths: tuple[Widths, ...], units: int) -> Tensor:
    """Return integers float64 [batch, units, most, tokens] of chunks; a bundle is repeated for all units that share it."""
    return torch.cat([unpack(x, widths) for x in chunks], -1).double().repeat_interleave(units // len(widths), 1)


def expected(
    logits: Tensor, values: Tensor, visible: tuple[Tensor, Tensor] | None = None, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    """Return the weighted means of integers and the log-sum-exp, with weights and integers in a dtype."""
    if visible is not None:
        token = torch.arange(logits.shape[-1])
        seen = (token >= visible[0][..., None]) & (token < visible[1][..., None])
        logits = logits.masked_fill(~seen, -torch.inf)
    lse = logits.logsumexp(-1)
    weights = (logits - lse[..., None]).nan_to_num(nan=-torch.inf).exp()
    return (weights.to(dtype) @ values.mT.to(dtype)).to(logits.dtype), lse


def scaled(queries: Tensor, widths: tuple[Widths, ...]) -> Tensor:
    """Return queries times quantization steps: logits of a few units, whatever the widths."""
    return queries / largest_integers(widths)[:, None].clamp_min(1) / max(1, most_coefficients(widths)) ** 0.5 * 8


def error(found: Tensor, right: Tensor) -> float:
    """Return the largest difference; infinite where one is NaN or only one is infinite."""
    apart = torch.where(found == right, 0, (found.double() - right).abs())
    return float(apart.nan_to_num(nan=torch.inf).amax()) if apart.numel() else 0.0


def check(
    found: tuple[Tensor, Tensor],
    logits: Tensor,
    values: Tensor,
    dtype: torch.dtype = torch.bfloat16,
    rough: Tensor | None = None,
    visible: tuple[Tensor, Tensor] | None = None,
) -> None:
    """Check the error rule: against float64, at most twice the error of PyTorch in a dtype, plus rounding of float32.

    `rough`: the logits that PyTorch computes in that dtype; None rounds the exact ones.
    """
    right = expected(logits, values, visible)
    plain = expected((logits if rough is None else rough).to(dtype).float(), values, visible, dtype)
    for got, exact, other, size in zip(found, right, plain, (256, 64), strict=True):
        assert got.dtype == torch.float32 and got.shape == exact.shape
        assert error(got, exact) <= 2 * error(other, exact) + 4 * FLOAT32 * size


def products(queries: Tensor, keys: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return logits in float64 and in a dtype."""
    return queries.double() @ keys, queries.to(dtype) @ keys.to(dtype)


def attend(
    run: Run,
    keys: list[Tensor],
    values: list[Tensor],
    key_widths: tuple[Widths, ...],
    value_widths: tuple[Widths, ...],
    projected: Tensor,
    *,
    splits: int | None = None,
    paired: bool | None = None,
    exact: bool = False,
    **queries: Any,
) -> tuple[Tensor, Tensor]:
    """Call `launch.attend` where the kernels run."""
    storage = PackedStorage(keys, values, (key_widths, value_widths))
    return run(launch.attend, storage, AttentionQueries(projected, exact=exact, **queries), splits=splits, paired=paired)


def widths_of(dim: int) -> tuple[Widths, ...]:
    """Return two bundles of nearly `dim` coefficients that differ in all widths."""
    return Widths(16, dim // 2, dim // 2 - 24), Widths(8, dim - 16, 0)


@pytest.mark.parametrize(
    ("dim", "group", "dtype"),
    [
        (64, 1, torch.bfloat16),
        (80, 3, torch.float16),
        (96, 4, torch.bfloat16),
        (128, 16, torch.float16),
        (128, 4, torch.bfloat16),
        (256, 3, torch.bfloat16),
        (64, 16, torch.float32),
        (96, 3, torch.float32),
    ],
)
def test_attention_is_as_exact_as_pytorch_in_the_same_dtype(run: Run, dim: int, group: int, dtype: torch.dtype) -> None:
    widths, chunks = widths_of(dim), (3, 2)
    keys, values = stored(widths, 1, chunks, dim), stored(widths[::-1], 1, chunks, dim + 1)
    queries = scaled(drawn(1, 2, group, most_coefficients(widths), seed=group), widths)
    exact = dtype == torch.float32
    found = attend(run, keys, values, widths, widths[::-1], queries, exact=exact, splits=2)
    logits, rough = products(queries, unpacked(keys, widths, 2), dtype)
    check(found, logits, unpacked(values, widths[::-1], 2), dtype, rough)


@PAIRED
@pytest.mark.parametrize(("chunks", "splits"), [((1,), None), ((0, 2, 0, 1, 3), 1), ((2, 0, 1, 3), 2), ((2, 1), 99)])
def test_chunks_and_splits_of_any_number_give_the_same(
    run: Run, paired: bool, chunks: tuple[int, ...], splits: int | None
) -> None:
    keys, values = stored(MIXED, 2, chunks, 1), stored(OTHER, 2, chunks, 2)
    queries = scaled(drawn(2, 3, 5, 32, seed=3), MIXED)
    found = attend(run, keys, values, MIXED, OTHER, queries, splits=splits, paired=paired)
    check(found, queries.double() @ unpacked(keys, MIXED, 3), unpacked(values, OTHER, 3))
    assert not found[0][:, 2].any()  # a bundle without coefficients


@PAIRED
def test_keys_without_a_coefficient_weigh_all_tokens_alike(run: Run, paired: bool) -> None:
    none = (Widths(0, 0, 0),) * 2
    keys, values = stored(none, 2, (2, 1), 1), stored(MIXED[:2], 2, (2, 1), 2)
    found, lse = attend(run, keys, values, none, MIXED[:2], torch.empty(2, 2, 3, 0), paired=paired)
    assert error(found, unpacked(values, MIXED[:2], 2).mean(-1)[:, :, None].expand(-1, -1, 3, -1)) < 1e-3
    assert error(lse, torch.full((2, 2, 3), 192.0, dtype=torch.float64).log()) < 1e-6
    found, lse = attend(run, values, keys, MIXED[:2], none, torch.zeros(2, 2, 3, 32), paired=paired)
    assert found.shape == (2, 2, 3, 0) and error(lse, torch.full((2, 2, 3), 192.0, dtype=torch.float64).log()) < 1e-6


def test_no_block_gives_zeros_and_no_weight(run: Run) -> None:
    found, lse = attend(run, [], [], MIXED, OTHER, torch.ones(2, 3, 4, 32))
    assert found.shape == (2, 3, 4, 24) and not found.any() and (lse == -torch.inf).all()


@pytest.mark.parametrize(
    ("rows", "paired"), [(1, True), (1, False), (9, True), (9, False), (31, False), (64, False), (100, False)]
)
def test_a_chunk_of_a_prompt_sees_what_each_row_may_and_a_row_that_sees_nothing_weighs_nothing(
    run: Run, rows: int, paired: bool
) -> None:
    widths, values_widths = (Widths(8, 16, 8),), (Widths(0, 32, 0),)
    keys, values = stored(widths, 2, (3, 2), rows), stored(values_widths, 2, (3, 2), rows + 1)
    queries = scaled(drawn(2, 1, rows, 32, seed=rows), widths)
    first = torch.arange(rows)[None, None].expand(2, 1, -1) * 3 - 20
    first = torch.stack([first[0], torch.full_like(first[0], 130)])
    stop = first + torch.tensor([70, 5])[:, None, None]
    first[:, :, rows // 2] = stop[:, :, rows // 2]
    for splits in (1, 3) if rows < 64 else (2,):
        found = attend(run, keys, values, widths, values_widths, queries, visible=(first, stop), splits=splits)
        k, v = unpacked(keys, widths, 1), unpacked(values, values_widths, 1)
        check(found, queries.double() @ k, v, visible=(first, stop))
        assert not found[0][:, :, rows // 2].any() and (found[1][:, :, rows // 2] == -torch.inf).all()


@pytest.mark.parametrize("rows", [5, 40])
def test_constants_and_soft_caps_are_of_logits(run: Run, rows: int) -> None:
    keys, values = stored(MIXED, 1, (2,), 5), stored(OTHER, 1, (2,), 6)
    queries, constant = scaled(drawn(1, 3, rows, 32, seed=7), MIXED), 5 * drawn(1, 3, rows, seed=8)
    logits = queries.double() @ unpacked(keys, MIXED, 3) + constant.double()[..., None]
    v = unpacked(values, OTHER, 3)
    for softcap, capped in ((None, logits), (4.0, 4 * (logits / 4).tanh())):
        for paired in (True, False) if rows < 8 else (False,):
            options = {"constant": constant, "softcap": softcap, "paired": paired}
            check(attend(run, keys, values, MIXED, OTHER, queries, **options), capped, v)


def a_key_mean(heads: int, dim: int, size: float) -> KeyMean:
    frequencies = 10000.0 ** -(torch.arange(dim // 2, dtype=torch.float64) / (dim // 2))
    mean = size * drawn(heads, dim, seed=1)
    mean[:, 3::7] = 0
    return KeyMean(mean, Rotation(frequencies, 1.0, "half"))


@pytest.mark.parametrize(("rows", "paired"), [(3, True), (3, False), (20, False)])
def test_a_mean_that_turns_with_positions_comes_back_into_logits(run: Run, rows: int, paired: bool) -> None:
    heads, dim, key_mean = 4, 32, a_key_mean(4, 32, 20.0)
    widths = MIXED[:2]
    keys, values = stored(widths, 2, (2, 1), 1), stored(widths, 2, (2, 1), 2)
    raw = drawn(2, heads, rows, dim, seed=4)
    queries = scaled(drawn(2, 2, 2 * rows, 32, seed=3), widths)
    starts = torch.tensor([[900], [7]]) + BLOCK * torch.arange(3)
    positions = (starts[..., None] + torch.arange(BLOCK)).flatten(1).double()
    angles = positions[:, None, :, None] * key_mean.rotation.frequencies
    means = key_mean.mean.double()[None, :, None].expand(2, -1, positions.shape[1], -1)
    logits = raw.double() @ rotate(means, Angles(angles.cos(), angles.sin()), "half").mT
    assert logits.abs().amax() > 200
    logits = logits.unflatten(1, (2, 2)).flatten(2, 3) + queries.double() @ unpacked(keys, widths, 2)
    mean_logits = key_mean.logit_factors(raw, starts).bundled(2)
    found = attend(run, keys, values, widths, widths, queries, rotated_mean=mean_logits, splits=2, paired=paired)
    check(found, logits, unpacked(values, widths, 2))
    plain = raw @ key_mean.rotated_to(positions).mT  # in float32
    plain = plain.unflatten(1, (2, 2)).flatten(2, 3) + queries @ unpacked(keys, widths, 2).float()
    found = attend(run, keys, values, widths, widths, queries, rotated_mean=mean_logits, exact=True, paired=paired)
    check(found, logits, unpacked(values, widths, 2), torch.float32, plain)


def test_encoded_keys_and_values_are_attended_to_as_if_they_were_decoded(run: Run) -> None:
    """Attend as a layer does: bundles of two heads, two queries per head, scale, offsets and a rotated mean."""
    heads, dim, group, key_mean = 4, 32, 2, a_key_mean(4, 32, 10.0)
    keys, values = some_heads(MIXED[:2], heads, dim, key_mean), some_heads(MIXED[1:], heads, dim)
    starts = torch.tensor([[70]]) + BLOCK * torch.arange(2)
    positions = (starts[..., None] + torch.arange(BLOCK)).flatten(1)
    x, y = drawn(1, heads, 2 * BLOCK, dim, seed=5) + key_mean.rotated_to(positions), drawn(1, heads, 2 * BLOCK, dim, seed=6)
    stored_keys = run(encode, x, keys.mean, keys.encoder, keys.widths, (), key_mean.rotated_to_blocks(starts))
    stored_values = run(encode, y, values.mean, values.encoder, values.widths)
    q = drawn(1, heads, group, dim, seed=7) * dim**-0.5
    by_head = [packer.decoder.unflatten(-1, (-1, dim)) for packer in (keys, values)]
    queries = torch.einsum("bgsrd,gmsd->bgsrm", q.unflatten(1, (2, -1)), by_head[0]).flatten(2, 3)
    constant = (q * keys.offset[:, None]).sum(-1).unflatten(1, (2, -1)).flatten(2, 3)
    mean_logits = key_mean.logit_factors(q, starts).bundled(2)
    options = {"constant": constant, "rotated_mean": mean_logits, "exact": True}
    means, lse = attend(run, [stored_keys], [stored_values], keys.widths, values.widths, queries, **options)
    found = torch.einsum("bgsrm,gmsd->bgsrd", means.unflatten(2, (-1, group)), by_head[1]).flatten(1, 2)
    k, v = keys.decode(stored_keys, positions), values.decode(stored_values, positions)
    logits = q.double() @ k.double().mT
    right = logits.softmax(-1) @ v.double()
    assert error(found + values.offset[:, None], right) < 1e-6 * float(values.offset.abs().amax())
    assert error(lse.view(1, heads, group), logits.logsumexp(-1)) < 1e-6 * float(constant.abs().amax())


@PAIRED
@pytest.mark.parametrize(("key_bundles", "value_bundles"), [(1, 2), (2, 1), (2, 3)])
def test_keys_and_values_whose_heads_share_bases_differently_are_attended_to_by_heads(
    run: Run, key_bundles: int, value_bundles: int, paired: bool
) -> None:
    heads, group = 6, 2
    widths, other = MIXED[:key_bundles], OTHER[:value_bundles]
    keys, values = stored(widths, 2, (2,), 1), stored(other, 2, (2,), 2)
    queries = scaled(drawn(2, key_bundles, heads // key_bundles * group, 32, seed=3), widths)
    found = attend(run, keys, values, widths, other, queries, paired=paired)
    by_head = queries.unflatten(2, (-1, group)).flatten(1, 2)
    assert found[0].shape[:3] == found[1].shape == (2, value_bundles, heads // value_bundles * group)
    found = tuple(x.unflatten(2, (-1, group)).flatten(1, 2) for x in found)
    check(found, by_head.double() @ unpacked(keys, widths, heads), unpacked(values, other, heads))


@pytest.mark.parametrize(("rows", "dtype"), [(4, torch.bfloat16), (33, torch.bfloat16), (16, torch.float32)])
def test_latents_and_rotary_keys_add_up_and_means_are_of_latents(run: Run, rows: int, dtype: torch.dtype) -> None:
    widths, rotary_widths = (Widths(16, 120, 64),), (Widths(8, 16, 0),)
    latents, rotary = stored(widths, 2, (2, 1), 1), stored(rotary_widths, 2, (2, 1), 2)
    q, r = (scaled(drawn(2, 1, rows, most_coefficients(w), seed=rows), w) for w in (widths, rotary_widths))
    exact = dtype == torch.float32
    for splits in (1, 2) if rows == 4 else (1,):
        found = attend(run, latents, rotary, widths, rotary_widths, q, projected_rotary=r, exact=exact, splits=splits)
        c = unpacked(latents, widths, 1)
        both = torch.cat([c, unpacked(rotary, rotary_widths, 1)], 2)
        logits, rough = products(torch.cat([q, r], -1), both, dtype)
        check(found, logits, c, dtype, rough)


@pytest.mark.parametrize(("rows", "blocks"), [(1, 17), (9, 1), (70, 1)])
def test_logits_and_sums_are_as_exact_as_the_reference(run: Run, rows: int, blocks: int) -> None:
    packed, batch = stored(MIXED, 2 if rows < 64 else 1, (blocks,), rows)[0], 2 if rows < 64 else 1
    q, a = drawn(batch, 3, rows, 32, seed=1), drawn(batch, 3, rows, blocks * BLOCK, seed=2).exp()
    q[..., 24:] *= 1e-6
    u = unpacked([packed], MIXED, 3)
    for own, x, right, scale in (("logits", q, q.double() @ u, 256), ("sums", a, a.double() @ u.mT, 256)):
        found = run(getattr(launch, own), packed, MIXED, x)
        plain = getattr(reference, own)(packed, MIXED, x)
        assert found.dtype == torch.float32 and found.shape == right.shape
        size = scale * float(x.abs().sum(-1).amax())
        assert error(found, right) <= 2 * error(plain, right) + 4 * FLOAT32 * size
        rough = run(getattr(launch, own), packed, MIXED, x.bfloat16())
        in_bf16 = getattr(reference, own)(packed, MIXED, x.bfloat16()).float()
        of_bf16 = x.bfloat16().double() @ (u if own == "logits" else u.mT)
        assert error(rough, of_bf16) <= 2 * error(in_bf16, of_bf16)


def test_what_a_query_holds_beyond_the_last_coefficient_of_a_bundle_is_not_read(run: Run) -> None:
    widths = (Widths(0, 8, 0), Widths(8, 8, 8))
    packed, q = stored(widths, 1, (2,), 2)[0], drawn(1, 2, 3, 24, seed=3)
    other = q.clone()
    other[:, 0, :, 8:] = torch.nan
    assert torch.equal(run(launch.logits, packed, widths, q), run(launch.logits, packed, widths, other))
    assert not run(launch.sums, packed, widths, drawn(1, 2, 3, 2 * BLOCK, seed=4))[:, 0, :, 8:].any()


def test_no_block_gives_no_logit_and_sums_of_zero(run: Run) -> None:
    packed = stored(MIXED, 2, (0,), 0)[0]
    assert run(launch.logits, packed, MIXED, torch.ones(2, 3, 4, 32)).shape == (2, 3, 4, 0)
    assert torch.equal(run(launch.sums, packed, MIXED, torch.empty(2, 3, 4, 0)), torch.zeros(2, 3, 4, 32))


def some_heads(
    widths: tuple[Widths, ...], heads: int, dim: int, key_mean: KeyMean | None = None, six: tuple[int, ...] = ()
) -> PackedHeads:
    """Return heads whose steps let some numbers saturate."""
    size = heads // len(widths) * dim
    steps = digit_layout(widths, six)[0][..., None] / 5 / size**0.5
    encoder = drawn(len(widths), most_coefficients(widths), size, seed=1) * steps
    for rows, w, count in zip(encoder, widths, six, strict=False):
        rows[w.eight + w.four :][:count] = rows[: w.eight + w.four][w.eight + w.four - count :]
    return PackedHeads(widths, encoder, encoder, drawn(heads, dim, seed=2), key_mean, six)


def integers(packed: Tensor, widths: tuple[Widths, ...], six: tuple[int, ...]) -> Tensor:
    """Return the integers of bytes, those of 6 bits in the row of their higher digit."""
    found = unpack(packed, widths).int()
    for i, (w, count) in enumerate(zip(widths, six, strict=False)):
        low = found[:, i, w.eight + w.four :][:, :count]
        found[:, i, w.eight + w.four - count : w.eight + w.four] *= 4
        found[:, i, w.eight + w.four - count : w.eight + w.four] += low
        low.zero_()
    return found


def differing(found: Tensor, right: Tensor, widths: tuple[Widths, ...], six: tuple[int, ...] = ()) -> float:
    """Return the share of integers that differ; none may differ by more than one."""
    apart = (integers(found, widths, six) - integers(right, widths, six)).abs()
    assert apart.amax() <= 1
    return float(apart.float().mean())


@pytest.mark.parametrize(
    ("widths", "six", "heads", "dim", "dtype"),
    [
        (MIXED, (), 6, 12, torch.bfloat16),
        (MIXED, (8, 0, 0), 3, 80, torch.float16),
        ((Widths(40, 80, 8), Widths(0, 0, 0)), (8, 0), 2, 128, torch.float32),
        ((Widths(8, 96, 96), Widths(0, 88, 80)), (64, 80), 2, 128, torch.bfloat16),
        ((Widths(0, 256, 0),), (), 1, 256, torch.bfloat16),
    ],
)
def test_encoded_bytes_are_those_of_the_reference_but_for_halves(
    run: Run, widths: tuple[Widths, ...], six: tuple[int, ...], heads: int, dim: int, dtype: torch.dtype
) -> None:
    x = drawn(2, 2 * BLOCK + 3, heads, dim, seed=3).to(dtype).transpose(1, 2)[:, :, 3:]
    packer = some_heads(widths, heads, dim, six=six)
    found = run(encode, x, packer.mean, packer.encoder, widths, six)
    assert differing(found, packer.encode(x, torch.arange(2 * BLOCK).expand(2, -1)), widths, six) < 1e-3


def test_what_turns_with_positions_is_taken_out_before_encoding(run: Run) -> None:
    heads, dim, key_mean = 3, 32, a_key_mean(3, 32, 30.0)
    packer = some_heads(MIXED, heads, dim, key_mean)
    starts = torch.tensor([[900], [7]]) + BLOCK * torch.arange(2)
    positions = (starts[..., None] + torch.arange(BLOCK)).flatten(1)
    x = drawn(2, heads, 2 * BLOCK, dim, seed=3) + key_mean.rotated_to(positions)
    found = run(encode, x, packer.mean, packer.encoder, MIXED, (), key_mean.rotated_to_blocks(starts))
    assert differing(found, packer.encode(x, positions), MIXED) < 1e-2


def test_pieces_of_splits_are_all_blocks_once_and_in_their_order() -> None:
    chunks = ((0, 0, 90, 40, 3), (1000, 500, 90, 40, 7), (-2000, -700, 30, 20, 1))
    for splits in (1, 2, 3, 5, 11):
        pieces, ranges = pieces_of(chunks, 40, 20, splits, torch.device("cpu"))
        assert ranges[0] == 0 and ranges[-1] == len(pieces) and (ranges.diff() > 0).all() and len(ranges) <= splits + 1
        seen = []
        for key, other, _, _, count, before in pieces.tolist():
            assert before == len(seen)
            seen += [(key + 10 * i, other + 5 * i) for i in range(count)]
        assert seen == [(key + 10 * i, other + 5 * i) for key, other, _, _, count in chunks for i in range(count)]
        sizes = [int(pieces[a:b, 4].sum()) for a, b in pairwise(ranges)]
        assert len(set(sizes[:-1])) <= 1 and sizes[-1] <= sizes[0]


@pytest.mark.parametrize(("programs", "blocks"), [(8, 2048), (128, 512), (1, 3), (5000, 64), (528, 100)])
def test_splits_fill_a_gpu_and_leave_each_some_blocks(programs: int, blocks: int) -> None:
    splits = splits_for(programs, blocks, 528)
    assert 1 <= splits <= max(1, blocks // 4)
    waves = programs * splits / 528
    assert splits == blocks // 4 or waves / -(-waves // 1) >= 0.85 or blocks < 8


def test_integers_come_back_from_halves_whatever_their_widths(run: Run) -> None:
    """Read one token at a time: a weight of 1 gives its integers without rounding."""
    codes = torch.arange(BLOCK, dtype=torch.uint8).expand(1, 1, 24, -1) * 4 + 3
    largest = largest_integers((Widths(8, 8, 8),)).to(torch.uint8)[..., None]
    codes = torch.minimum(codes, largest[None])
    found = run(launch.sums, pack(codes, (Widths(8, 8, 8),)), (Widths(8, 8, 8),), torch.eye(BLOCK)[None, None])
    assert torch.equal(found, codes.float().mT)


@pytest.mark.skipif(environ.get("TRITON_INTERPRET") == "1", reason="what is interpreted is not compiled")
@pytest.mark.parametrize("capability", [80, 90])
def test_attention_compiles_without_a_gpu_to_wide_loads_and_tensor_cores(
    capability: int, monkeypatch: pytest.MonkeyPatch, tmp_path: object
) -> None:
    from eigencache.kernels.packed.triton.attend import attend_kernel
    from eigencache.kernels.packed.triton.decode import decode_kernel

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kinds = dict.fromkeys(("rotary", "first", "stop", "even", "odd", "cos", "sin", "table"))
    kinds |= dict.fromkeys(("keys", "others", "ranges", "key_places", "other_places"), "*i32")
    kinds |= dict.fromkeys(("slopes", "added", "sums", "tops", "totals"), "*fp32")
    kinds |= {"pieces": "*i64", "queries": "*fp16", "cap": "fp32"}
    kinds |= dict.fromkeys(("key_rows", "key_nibbles", "key_crumbs", "value_rows"), "*i32")
    constants = {"C": 128, "P": 16, "TERMS": 1, "CAPPED": False, "BLOCKS": 1}
    pairs = {"KW": 64, "KN": 4, "VW": 64, "VN": 4}
    few = compiled(decode_kernel, kinds, constants | pairs | {"M": 8}, capability, 2)
    assert "ld.global.v4.b32" in few.asm["ptx"] and "mma.sync" in few.asm["ptx"]
    assert few.metadata.shared < 2**15
    constants |= {"V": 128}
    many = compiled(attend_kernel, kinds, constants | {"M": 128, "AXIS": 1}, capability, 8)
    assert ("wgmma" if capability == 90 else "mma.sync") in many.asm["ptx"] and many.metadata.shared < 2**17


@pytest.mark.skipif(environ.get("TRITON_INTERPRET") == "1", reason="what is interpreted is not compiled")
def test_encoding_compiles_without_a_gpu_to_products_of_tf32(monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> None:
    from eigencache.kernels.packed.triton.encode import _encode

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kinds = dict.fromkeys(("still", "quarter", "starts", "table")) | dict.fromkeys(("mean", "encoder"), "*fp32")
    kinds |= {"x": "*bf16", "counts": "*i32", "out": "*u8"}
    kernel = compiled(_encode, kinds, {"K": 64, "R": 32, "dim_stride": 1}, 80, 4)
    assert "tf32" in kernel.asm["ptx"] and kernel.metadata.shared < 2**16


def compiled(kernel: Any, kinds: dict[str, str | None], constants: dict[str, Any], capability: int, warps: int) -> Any:
    """Compile a kernel for tensors and integers that are multiples of 16."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    kinds = {name: kind for name, kind in kinds.items() if name in names}
    constants = constants | {name: None for name, kind in kinds.items() if kind is None}
    signature = {name: "constexpr" if name in constants else kinds.get(name) or "i32" for name in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if signature[name][0] in "*i"}
    places = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, signature, constexprs=places, attrs=aligned)
    options = {"num_warps": warps, "num_stages": 1, "enable_fp_fusion": True}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def used_backend() -> tuple[str, Tensor, Tensor]:
    """Return the name of the Triton backend, which is checked first, and log-sum-exp and means that it computes."""
    from eigencache.kernels.packed.backend import triton_backend

    backend, widths = triton_backend(DEVICE), (Widths(8, 16, 8),)
    keys, values = ([x.to(DEVICE) for x in stored(widths, 2, (2, 1), seed)] for seed in (1, 2))
    q = scaled(drawn(2, 1, 3, 32, seed=3), widths).to(DEVICE)
    assert backend.attention is not None
    top, total, sums = backend.attention(PackedStorage(keys, values, (widths, widths)), AttentionQueries(q))
    return backend.name, top + total.log(), sums / total[..., None]


def test_the_live_cache_has_it_for_a_backend_that_was_looked_at_first(run: Run) -> None:
    widths = (Widths(8, 16, 8),)
    name, lse, means = run(used_backend)
    keys, values = (stored(widths, 2, (2, 1), seed) for seed in (1, 2))
    logits = scaled(drawn(2, 1, 3, 32, seed=3), widths).double() @ unpacked(keys, widths, 1)
    assert name == "triton"
    torch.testing.assert_close(lse.double(), logits.logsumexp(-1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(means.double(), logits.softmax(-1) @ unpacked(values, widths, 1).mT, rtol=1e-4, atol=1e-3)


def refused() -> str:
    from eigencache.errors import CodecError
    from eigencache.kernels.packed.backend import triton_backend

    wrong, triton_backend_ = launch.sums, triton_backend.__wrapped__
    launch.sums = lambda *given: 1.01 * wrong(*given)  # type: ignore[assignment]
    try:
        triton_backend_(DEVICE)
    except CodecError as error:
        return str(error)
    finally:
        launch.sums = wrong
    return "nothing"


def test_a_device_that_computes_something_else_is_refused(run: Run) -> None:
    assert "compute wrong results on" in run(refused)
