"""A PCA codec holds the bytes it says, loses what it should and nothing else, and refuses a cache of another model."""

import pytest
import torch
from torch import Tensor

from eigencache.codec.base import Encoded, SixteenBit
from eigencache.codec.pca import Part, PCACodec, PCAGroup
from eigencache.errors import CodecError
from eigencache.spectral.moments import SecondOrder
from eigencache.spectral.rope import PAIRINGS, Pairing, Rotation, rotate
from eigencache.spectral.transform import Transform, fit_transform

HEADS, DIM, LAYERS = 2, 8, 3
ROTATION = Rotation(10.0 ** (-torch.arange(4, dtype=torch.float64)), 1.2, "half")


def cache(seq: int, seed: int = 0, batch: int = 2) -> dict[int, tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    draw = lambda: torch.randn(batch, HEADS, seq, DIM, generator=generator)  # noqa: E731
    return {i: (draw(), draw() + i) for i in range(LAYERS)}


def fitted(x: Tensor) -> Transform:
    x = x.double()
    mean = x.mean(0)
    return fit_transform(SecondOrder(len(x), mean, (x - mean).mT @ (x - mean))).to(torch.float32)


def value_codec(scope: str, rank: int | None = None, bits: int = 16) -> PCACodec:
    """Of values, fitted on the cache of seed 0 itself."""
    values = {i: x for i, (_, x) in cache(200).items()}
    rows = lambda x: x.transpose(1, 2).flatten(2).flatten(0, 1)  # noqa: E731
    if scope == "head":
        groups = [
            PCAGroup((Part(i, 1, (h, h + 1), DIM),), fitted(rows(x[:, h : h + 1])))
            for i, x in values.items()
            for h in range(HEADS)
        ]
    elif scope == "layer":
        groups = [PCAGroup((Part(i, 1, (0, HEADS), DIM),), fitted(rows(x))) for i, x in values.items()]
    else:
        parts = tuple(Part(i, 1, (0, HEADS), DIM) for i in values)
        groups = [PCAGroup(parts, fitted(torch.cat([rows(x) for x in values.values()], -1)))]
    codec = PCACodec("v", tuple(groups), {}, torch.float32, bits)  # type: ignore[arg-type]
    return codec if rank is None else codec.truncated(rank)


@pytest.mark.parametrize("scope", ["head", "layer", "all"])
def test_full_rank_changes_values_by_rounding_alone_and_keys_not_at_all_beyond_16_bits(scope: str) -> None:
    given = cache(70, seed=1)
    decoded = value_codec(scope).decode(value_codec(scope).encode(given, 5))
    for layer_idx, (keys, values) in given.items():
        torch.testing.assert_close(decoded[layer_idx][1], values, rtol=0, atol=2e-2)
        assert torch.equal(decoded[layer_idx][0], keys.half().float())


@pytest.mark.parametrize("scope", ["head", "layer", "all"])
@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize("rank", [1, 5, 8])
def test_the_bytes_are_those_of_the_formula_and_exist(scope: str, bits: int, rank: int) -> None:
    codec = value_codec(scope, rank, bits)
    encoded = codec.encode(cache(70, batch=1), 0)
    assert encoded.nbytes == codec.payload_nbytes(70, raw_values_per_token=LAYERS * HEADS * DIM)
    assert encoded.nbytes == sum(t.numel() * t.element_size() for t in encoded.tensors.values())


def test_more_rank_and_more_bits_lose_less() -> None:
    given = cache(200)

    def loss(codec: PCACodec) -> float:
        decoded = codec.decode(codec.encode(given, 0))
        return sum(float((decoded[i][1] - given[i][1]).square().sum()) for i in given)

    ranks = [loss(value_codec("layer", rank)) for rank in (2, 6, 10, 16)]
    assert ranks == sorted(ranks, reverse=True)
    assert loss(value_codec("head", 8, 4)) > loss(value_codec("head", 8, 8)) > loss(value_codec("head", 8, 16))


@pytest.mark.parametrize("pairing", PAIRINGS)
def test_keys_of_few_directions_before_rotation_survive_at_that_rank(pairing: Pairing) -> None:
    generator = torch.Generator().manual_seed(0)
    rotation = Rotation(ROTATION.frequencies, ROTATION.scale, pairing)
    before = torch.randn(1, 1, 300, 2, generator=generator) @ torch.randn(2, DIM, generator=generator) + 3
    start = 11
    keys = rotate(before, rotation.angles(torch.arange(start, start + 300)), pairing)
    codec = PCACodec(
        "k", (PCAGroup((Part(0, 0, (0, 1), DIM),), fitted(before[0, 0])),), {0: (0, rotation)}, torch.float32
    ).truncated(2)
    given = {0: (keys, torch.zeros_like(keys))}
    right = codec.decode(codec.encode(given, start))[0][0]
    torch.testing.assert_close(right, keys, rtol=0, atol=3e-2)
    wrong = codec.decode(codec.encode(given, start + 40))[0][0]
    assert float((wrong - keys).abs().max()) > 1  # the positions matter


def test_a_basis_that_groups_share_counts_once() -> None:
    transform = fitted(torch.randn(100, DIM))
    parts = [Part(0, 1, (h, h + 1), DIM) for h in range(HEADS)]
    shared = PCACodec("v", tuple(PCAGroup((part,), transform) for part in parts), {}, torch.float32)
    assert shared.nbytes == transform.nbytes
    assert shared.truncated(3).nbytes == transform.truncated(3).nbytes


def test_rows_can_be_chosen_without_decoding() -> None:
    codec, given = value_codec("layer", 8, 4), cache(70)
    encoded = codec.encode(given, 0)
    chosen = codec.decode(encoded.select(torch.tensor([1, 1])))
    assert torch.equal(chosen[0][1][0], codec.decode(encoded)[0][1][1])


@pytest.mark.parametrize("rank", [0, 17])
def test_a_rank_that_no_group_has_is_refused(rank: int) -> None:
    with pytest.raises(CodecError, match=f"rank {rank} is out of range: v has ranks 1 to 16"):
        value_codec("layer").truncated(rank)


def test_a_cache_of_another_model_is_refused() -> None:
    codec = value_codec("layer")
    with pytest.raises(CodecError, match="fitted on another model"):
        codec.encode({0: cache(5)[0]}, 0)
    narrow = {i: (k[..., :4], v[..., :4]) for i, (k, v) in cache(5).items()}
    with pytest.raises(CodecError, match="fitted on another model"):
        codec.encode(narrow, 0)


def test_what_does_not_fit_into_16_bits_is_refused_and_views_count_in_full() -> None:
    with pytest.raises(CodecError, match=r"layer 0: 1e\+06 does not fit into torch.float16"):
        SixteenBit().encode({0: (torch.full((1, 1, 1, 1), 1e6), torch.zeros(1, 1, 1, 1))}, 0)
    whole = torch.zeros(100)
    assert Encoded({"a": whole[:1], "b": whole[1:2]}, 0, 1).nbytes == 400


def test_other_bit_widths_are_refused() -> None:
    codec = value_codec("layer").truncated(2, bits=3)  # type: ignore[arg-type]
    with pytest.raises(CodecError, match="`bits` is 3: use 16, 8 or 4"):
        codec.encode(cache(9), 0)
