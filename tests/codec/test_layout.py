"""Which numbers of a cache stand side by side: a token's vector and its slots are inverse to each other, keys unrotated."""

import pytest
import torch
from torch import Tensor

from eigencache.codec.layout import Layout, Part, by_layer, rotated, slots_of, unrotated
from eigencache.errors import CodecError
from eigencache.spectral.rope import PAIRINGS, Pairing, Rotation, rotate


def rotation(pairs: int, pairing: Pairing = "half", scale: float = 1.2) -> Rotation:
    return Rotation(3.0 ** (-torch.arange(pairs, dtype=torch.float64)), scale, pairing)


def gqa(pairing: Pairing = "half", pairs: int = 4) -> Layout:
    """Three layers of two heads of 8; with fewer than 4 pairs the last numbers are not rotated."""
    parts = tuple(Part(i, slot, (0, 2), 8) for slot in (0, 1) for i in range(3))
    return Layout(parts, {i: (0, rotation(pairs, pairing)) for i in range(3)})


def mla(pairing: Pairing = "interleaved") -> Layout:
    """A latent of 20 and a rotary key of 8 that stands in the second slot."""
    parts = tuple(Part(i, slot, (0, 1), (20, 8)[slot]) for slot in (0, 1) for i in range(2))
    return Layout(parts, {i: (1, rotation(4, pairing)) for i in range(2)})


def mixed() -> Layout:
    """Layers of unlike shapes, one of them without rotation, heads of one slot in two parts and out of order."""
    parts = (
        Part(4, 0, (1, 3), 6),
        Part(4, 1, (0, 3), 10),
        Part(1, 1, (0, 1), 4),
        Part(4, 0, (0, 1), 6),
        Part(1, 0, (0, 1), 4),
    )
    return Layout(parts, {4: (0, rotation(2))})


LAYOUTS = {f"gqa {pairing}": gqa(pairing) for pairing in PAIRINGS}
LAYOUTS |= {f"mla {pairing}": mla(pairing) for pairing in PAIRINGS}
LAYOUTS |= {f"partial {pairing}": gqa(pairing, 2) for pairing in PAIRINGS} | {"mixed": mixed()}


def drawn(layout: Layout, seq: int, batch: int = 2, seed: int = 0) -> dict[int, tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.randn(batch, seq, layout.width, generator=generator)
    return by_layer(Layout(layout.parts, {}).slots(vectors, 0), torch.float32)


@pytest.mark.parametrize("start", [0, 5, 4000])
@pytest.mark.parametrize("name", LAYOUTS)
def test_slots_are_the_inverse_of_vectors(name: str, start: int) -> None:
    layout, cached = LAYOUTS[name], drawn(LAYOUTS[name], 9)
    vectors = layout.vectors(cached, start)
    assert vectors.shape == (2, 9, layout.width) and vectors.dtype == torch.float32
    again = by_layer(layout.slots(vectors, start), torch.float32)
    assert list(again) == sorted(cached)
    for layer_idx, both in cached.items():
        for x, y in zip(both, again[layer_idx], strict=True):
            torch.testing.assert_close(y, x, rtol=0, atol=1e-5)
    torch.testing.assert_close(layout.vectors(again, start), vectors, rtol=0, atol=1e-5)


def test_numbers_stand_head_after_head_and_part_after_part() -> None:
    layout = mixed()
    cached = drawn(layout, 5)
    vectors = Layout(layout.parts, {}).vectors(cached, 0)
    expected = [cached[4][0][:, 1], cached[4][0][:, 2], *cached[4][1].unbind(1), cached[1][1][:, 0]]
    expected += [cached[4][0][:, 0], cached[1][0][:, 0]]
    assert torch.equal(vectors, torch.cat(expected, -1))


@pytest.mark.parametrize("pairing", PAIRINGS)
@pytest.mark.parametrize("slot", [0, 1])
def test_rotated_slots_are_seen_as_they_were_before_rotation_at_their_positions(pairing: Pairing, slot: int) -> None:
    layout = (gqa, mla)[slot](pairing)
    before = drawn(layout, 7)
    turn = layout.rotations[0][1]
    angles = turn.angles(torch.arange(30, 37))
    after = {
        i: tuple(rotate(x, angles, pairing) if s == slot else x for s, x in enumerate(both)) for i, both in before.items()
    }
    expected = Layout(layout.parts, {}).vectors(before, 0)
    torch.testing.assert_close(layout.vectors(after, 30), expected, rtol=0, atol=1e-5)
    assert float((layout.vectors(after, 31) - expected).abs().max()) > 0.1
    assert torch.equal(rotated(unrotated(before, {}, 0), {}, 0)[0, slot], before[0][slot])


@pytest.mark.parametrize("name", LAYOUTS)
def test_layers_that_hold_the_last_tokens_only_are_filled_from_the_mean(name: str) -> None:
    layout, cached, start = LAYOUTS[name], drawn(LAYOUTS[name], 9), 6
    whole, mean = layout.vectors(cached, start), torch.arange(float(layout.width))
    sliding = min(cached)
    cut = cached | {sliding: tuple(x[:, :, 4:] for x in cached[sliding])}
    expected, at = whole.clone(), 0
    for part in layout.parts:
        if part.layer_idx == sliding:
            expected[:, :4, at : at + part.width] = mean[at : at + part.width]
        at += part.width
    torch.testing.assert_close(layout.vectors(cut, start, mean), expected, rtol=0, atol=1e-5)
    with pytest.raises(CodecError, match=f"layer {sliding} holds 5 tokens, other layers hold 9"):
        layout.vectors(cut, start)


def test_vectors_are_float32_whatever_the_model_computes_in() -> None:
    cached = {i: tuple(x.bfloat16() for x in both) for i, both in drawn(gqa(), 4).items()}
    vectors = gqa().vectors(cached, 0)
    assert vectors.dtype == torch.float32
    again = by_layer(gqa().slots(vectors, 0), torch.bfloat16)
    assert all(torch.equal(again[i][1], cached[i][1]) for i in cached)


@pytest.mark.parametrize(
    "harm", ["layer missing", "layer more", "head missing", "head more", "wider", "narrower", "no slot"]
)
@pytest.mark.parametrize("rotating", [True, False])
def test_a_cache_of_other_heads_is_refused_by_layer(harm: str, rotating: bool) -> None:
    layout = gqa() if rotating else Layout(gqa().parts, {})
    cached = drawn(layout, 4)
    x = cached[2][0]
    harmed = {
        "layer missing": {i: cached[i] for i in (0, 1)},
        "layer more": cached | {3: cached[2]},
        "head missing": cached | {2: (x[:, :1], x[:, :1])},
        "head more": cached | {2: (torch.cat([x, x], 1), torch.cat([x, x], 1))},
        "wider": cached | {2: (torch.cat([x, x], -1), torch.cat([x, x], -1))},
        "narrower": cached | {2: (x[..., :4], x[..., :4])},
        "no slot": cached | {2: (x[:, :0], x)},
    }
    with pytest.raises(CodecError, match=r"layers \[[23]\].*fitted on another model"):
        layout.require_all(harmed[harm])
    layout.require_all(cached)
    if harm.endswith("missing"):
        with pytest.raises(CodecError, match="fitted on another model"):
            layout.vectors(harmed[harm], 0)


def test_both_slots_of_every_layer_come_back_layers_ascending() -> None:
    x = torch.randn(1, 3, 4)
    slots = slots_of(
        [(Part(7, 1, (0, 2), 2), x), (Part(2, 0, (0, 1), 4), x), (Part(7, 0, (0, 1), 4), x), (Part(2, 1, (0, 1), 4), x)]
    )
    layers = by_layer(slots, torch.float16)
    assert list(layers) == [2, 7]
    assert {t.dtype for both in layers.values() for t in both} == {torch.float16}
    assert torch.equal(layers[7][1][0, 1], x[0, :, 2:].half())


def test_every_head_has_its_width_in_the_order_of_the_parts() -> None:
    assert Layout((Part(0, 0, (0, 2), 4), Part(0, 1, (0, 1), 6)), {}).head_widths == [4, 4, 6]
