"""XQuant stores a layer's input, recovered exactly from keys and values, and recomputes both from what it stored."""

import pytest
import torch

from baseline_caches import rotation
from eigencache.codec.baselines.xquant import XQuant, xquant
from eigencache.errors import CodecError
from eigencache.spectral.rope import rotate

BATCH, SEQ, HIDDEN, HEADS, DIM = 2, 13, 36, 3, 12
LAYERS = (0, 4)


def planted(bias: bool = True, start: int = 0) -> tuple[dict, dict, dict, dict]:
    """Weights, inputs, rotations, and the cache that they make."""
    generator = torch.Generator().manual_seed(0)
    weights, inputs, turned, cached = {}, {}, {}, {}
    for i in LAYERS:
        weight = torch.randn(2 * HEADS * DIM, HIDDEN, generator=generator)
        weights[i] = (weight, torch.randn(2 * HEADS * DIM, generator=generator) if bias else None)
        inputs[i] = torch.randn(BATCH, SEQ, HIDDEN, generator=generator)
        turned[i] = (0, rotation(DIM))
        y = inputs[i] @ weight.mT + (weights[i][1] if bias else 0)
        keys, values = (part.unflatten(-1, (HEADS, DIM)).transpose(1, 2) for part in y.chunk(2, -1))
        angles = rotation(DIM).angles(torch.arange(start, start + SEQ))
        cached[i] = (rotate(keys, angles, "half"), values)
    return weights, inputs, turned, cached


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("start", [0, 500])
def test_eight_bits_of_the_input_bring_keys_and_values_back(bias: bool, start: int) -> None:
    weights, _, turned, cached = planted(bias, start)
    codec = xquant(weights, HEADS, turned, 8, torch.float32)
    decoded = codec.decode(codec.encode(cached, start))
    for i in LAYERS:
        for x, again in zip(cached[i], decoded[i], strict=True):
            assert (again - x).square().mean() < 1e-4 * x.square().mean()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_what_is_stored_is_the_input_within_half_a_step(bits) -> None:
    weights, inputs, turned, cached = planted()
    codec = xquant(weights, HEADS, turned, bits, torch.float32)
    encoded = codec.encode(cached, 0)
    assert codec.nbytes == 0
    assert encoded.nbytes == len(LAYERS) * BATCH * SEQ * (-(-HIDDEN * bits // 8) + 4)
    decoded = codec.decode(encoded)
    for i in LAYERS:
        columns = torch.cat([x.transpose(1, 2).flatten(2) for x in (decoded[i][1], cached[i][1])], 0)
        stored, true = (columns - weights[i][1][HEADS * DIM :]).chunk(2) if weights[i][1] is not None else columns.chunk(2)
        values = weights[i][0][HEADS * DIM :]
        found = torch.linalg.lstsq(values, stored.flatten(0, 1).mT).solution.mT
        again = torch.linalg.lstsq(values, true.flatten(0, 1).mT).solution.mT
        assert torch.allclose(again, inputs[i].flatten(0, 1), atol=1e-2)
        step = encoded.tensors[f"{i}.step"].float().flatten(0, 1)
        assert ((found - again).abs() <= step / 2 + 2e-2).all()


def test_groups_of_128_have_scales_of_their_own() -> None:
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(2 * 160, 260, generator=generator)
    y = torch.randn(1, 5, 260, generator=generator) @ weight.mT
    keys, values = (part.unflatten(-1, (2, 80)).transpose(1, 2) for part in y.chunk(2, -1))
    encoded = xquant({0: (weight, None)}, 2, {}, 4, torch.float32).encode({0: (keys, values)}, 0)
    assert encoded.tensors["0.low"].shape == (1, 5, 3)
    assert encoded.nbytes == 5 * (130 + 3 * 4)


def test_inputs_that_cannot_be_recovered_are_refused() -> None:
    with pytest.raises(CodecError, match="layer 2 has 32 keys and values for 64 inputs: the inputs cannot be recovered"):
        xquant({2: (torch.randn(32, 64), None)}, 2, {}, 4, torch.float32)
    deficient = torch.randn(32, 4) @ torch.randn(4, 16)
    with pytest.raises(CodecError, match="layer 1 are rank-deficient"):
        xquant({1: (deficient, None)}, 2, {}, 4, torch.float32)
    with pytest.raises(CodecError, match="3 heads cannot share"):
        xquant({1: (torch.randn(32, 16), None)}, 3, {}, 4, torch.float32)


def test_layers_without_weights_are_refused() -> None:
    weights, _, turned, cached = planted()
    codec = xquant(weights, HEADS, turned, 4, torch.float32)
    assert isinstance(codec, XQuant)
    with pytest.raises(CodecError, match="no weights of layer 9"):
        codec.encode(cached | {9: cached[0]}, 0)
