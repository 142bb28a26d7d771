"""A saved live codec packs the same bytes, and a damaged one is refused naming the file and what is wrong."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from codec_folders import ORIGIN, WINDOWS, Damage, assert_refused, at, card, put, tensors
from eigencache.codec.base import Encoded
from eigencache.codec.live.codec import LiveCodec
from eigencache.codec.live.packed_heads import PackedHeads
from eigencache.codec.live.rotated_mean import KeyMean
from eigencache.codec.pca import Part, PCACodec, PCAGroup
from eigencache.codec.saved.eigen_card import EigenCardSettings
from eigencache.codec.saved.folder import CARD, LIVE, TENSORS, check_replaceable, load_codec, load_live, save_codec
from eigencache.codec.saved.live import LiveCard, LiveCardSettings
from eigencache.codec.saved.pca import PCACardSettings
from eigencache.errors import CodecError, OutputError
from eigencache.kernels.packed.format import Widths
from eigencache.records.fit import Expected
from eigencache.spectral.rope import PAIRINGS, Pairing, Rotation
from eigencache.spectral.transform import Transform

HEADS, KEYS, VALUES = 2, 8, 16  # numbers of a key and of a value
LAYERS = (0, 2)
WIDTHS = ((Widths(8, 0, 0), Widths(0, 8, 0)), (Widths(8, 16, 8),))  # keys in two bundles, values in one
EXPECTED = Expected(
    context=2048,
    bits_per_value=3.5,
    coded_bits=400.0,
    tokens=4000,
    delta_nll=0.01,
    delta_nll_interval=(-0.005, 0.02),
    kl=0.02,
    top1_agreement=0.95,
)
ABOUT = LiveCardSettings(alpha=0.75, shared=128, sinks=None, window=3)

SETTINGS_OF_EIGEN: dict[str, Any] = {
    "scope": "joint", "group": 3, "metric": "fisher", "alpha": 1, "text": False, "sinks": 0, "window": 0, "kept_bits": 8,
    "block": 64, "amortize": 1000,
}  # fmt: skip


def planted(pairing: Pairing | None = "half", turned: int = 0, seed: int = 0) -> LiveCodec:
    """All tensors drawn; slot `turned` of the second layer turns unless `pairing` is None."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    def heads(layer_idx: int, slot: int) -> PackedHeads:
        widths, dim = WIDTHS[slot], (KEYS, VALUES)[slot]
        most, numbers = max(w.coefficients for w in widths), HEADS // len(widths) * dim
        turning = None
        if pairing and (layer_idx, slot) == (2, turned):
            turning = KeyMean(drawn(HEADS, dim), Rotation(0.3 ** torch.arange(3, dtype=torch.float64), 1.1, pairing))
        shape = len(widths), most, numbers
        return PackedHeads(widths, drawn(*shape), drawn(*shape), drawn(HEADS, dim), turning)

    layers = {i: (heads(i, 0), heads(i, 1)) for i in LAYERS}
    return LiveCodec("planted – ünïcode", layers, 2, 3, torch.float32, 512)


def saved(folder: Path, codec: LiveCodec | None = None) -> Path:
    save_codec(folder, codec or planted(), ABOUT, ORIGIN, WINDOWS, EXPECTED)
    return folder


def saved_pca(folder: Path) -> Path:
    """A codec of another kind, the stored one beside which a live one lies."""
    transform = Transform(torch.zeros(8), torch.ones(8, 2), torch.ones(2, 8), torch.ones(8))
    codec = PCACodec("stored", (PCAGroup((Part(0, 0, (0, 1), 8),), transform),), {}, torch.float32, 16)
    about = PCACardSettings(
        target="k", scope="head", frame="post", metric="frobenius", alpha=1, centered=True, basis="pca", bits=16, rank=2
    )
    save_codec(folder, codec, about, ORIGIN, WINDOWS)
    return folder


def cache(tokens: int = 150, seed: int = 0) -> dict[int, tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    sizes = ((2, HEADS, tokens, KEYS), (2, HEADS, tokens, VALUES))
    return {i: tuple(torch.randn(size, generator=generator) for size in sizes) for i in LAYERS}  # type: ignore[misc]


def assert_alike(codec: LiveCodec, other: LiveCodec) -> None:
    for field in ("name", "sinks", "window", "dtype", "reach", "nbytes", "bits_per_value"):
        assert getattr(other, field) == getattr(codec, field), field
    assert list(other.layers) == list(codec.layers)
    for i in codec.layers:
        for a, b in zip(codec.layers[i], other.layers[i], strict=True):
            assert a.widths == b.widths and (a.rotated_mean is None) == (b.rotated_mean is None)
            assert all(torch.equal(x, y) for x, y in zip(a.tensors(), b.tensors(), strict=True))
    for start in (0, 5):
        encoded, again = codec.encode(cache(), start), other.encode(cache(), start)
        assert encoded.tensors.keys() == again.tensors.keys()
        assert all(torch.equal(x, again.tensors[name]) for name, x in encoded.tensors.items())
        decoded, once_more = codec.decode(encoded), other.decode(again)
        assert all(torch.equal(a, b) for i in decoded for a, b in zip(decoded[i], once_more[i], strict=True))


@pytest.mark.parametrize("turned", [0, 1])
@pytest.mark.parametrize("pairing", [None, *PAIRINGS])
def test_what_is_loaded_packs_the_same_bytes(pairing: Pairing | None, turned: int, tmp_path: Path) -> None:
    codec = planted(pairing, turned)
    found = load_codec(saved(tmp_path / "codec", codec)).codec
    assert isinstance(found, LiveCodec)
    assert_alike(codec, found)


def test_another_codec_packs_other_bytes(tmp_path: Path) -> None:
    other = load_codec(saved(tmp_path / "codec", planted(seed=1))).codec
    assert isinstance(other, LiveCodec)
    with pytest.raises(AssertionError):
        assert_alike(planted(), other)


def test_bundles_without_coefficients_and_other_dtypes_survive(tmp_path: Path) -> None:
    codec = planted()
    none = Widths(0, 0, 0)
    keys, values = codec.layers[0]
    empty = replace(values, widths=(none,), encoder=values.encoder[:, :0], decoder=values.decoder[:, :0])
    half = replace(keys, widths=(none, keys.widths[1]), encoder=keys.encoder.clone(), decoder=keys.decoder.clone())
    half.encoder[0], half.decoder[0] = 0, 0
    other = replace(codec, layers={0: (half, empty), 2: codec.layers[2]}, dtype=torch.bfloat16)
    origin = ORIGIN.model_copy(update={"dtype": "bfloat16"})
    save_codec(tmp_path / "codec", other, ABOUT, origin, WINDOWS, EXPECTED)
    assert_alike(other, load_codec(tmp_path / "codec").codec)  # type: ignore[arg-type]


def test_tensors_that_are_views_are_stored_as_they_look(tmp_path: Path) -> None:
    codec = planted()
    turned = lambda x: x.mT.contiguous().mT  # noqa: E731 - used twice
    keys, values = codec.layers[0]
    keys = replace(keys, encoder=turned(keys.encoder), decoder=turned(keys.decoder))
    assert not keys.encoder.is_contiguous()
    other = replace(codec, layers=codec.layers | {0: (keys, values)})  # type: ignore[operator]
    found = load_codec(saved(tmp_path / "codec", other)).codec
    assert all(torch.equal(x, y) for x, y in zip(codec.tensors(), found.tensors(), strict=True))  # type: ignore[union-attr]


def test_the_card_says_what_it_was_given(tmp_path: Path) -> None:
    codec = planted()
    found = load_codec(saved(tmp_path / "codec", codec))
    assert isinstance(found.card, LiveCard)
    assert (found.card.origin, found.card.settings, found.card.expected) == (ORIGIN, ABOUT, EXPECTED)
    assert (found.card.kind, found.card.sinks, found.card.window, found.coded_bits) == ("live", 2, 3, None)
    assert (found.windows == WINDOWS).all() and found.windows.dtype == np.uint64
    said = [(one.layer_idx, one.slot, one.heads, one.dim, len(one.bundles)) for one in found.card.slots]
    assert said == [(0, 0, 2, 8, 2), (0, 1, 2, 16, 1), (2, 0, 2, 8, 2), (2, 1, 2, 16, 1)]
    assert found.card.slots[1].bundles[0].model_dump() == {"eight": 8, "four": 16, "two": 8, "six": 0}
    stored = load_file(tmp_path / "codec" / TENSORS)
    assert sum(x.nbytes for n, x in stored.items() if not n.startswith("calibration")) == codec.nbytes


def slot(place: int, **changed: Any) -> Damage:
    return card(lambda c: c["slots"][place].update(changed))


def bundle(place: int, **changed: Any) -> Damage:
    return card(lambda c: c["slots"][place]["bundles"][0].update(changed))


def rotation(**changed: Any) -> Damage:
    return card(lambda c: c["rotations"][0].update(changed))


SLOTS = "the slots are not both of every layer, one after the other"
CARD_DAMAGES: dict[str, tuple[Damage, str]] = {
    "another kind": (
        card(lambda c: c.update(kind="zip")),
        "kind 'zip' is unknown to this version, which reads eigen, live, pca",
    ),
    "the other kind": (card(lambda c: c.update(kind="eigen")), "schema eigencache.codec/1: settings.scope: Field required"),
    "another schema": (card(lambda c: c.update(schema_version="eigencache.codec/2")), "should be 'eigencache.codec/1'"),
    "unknown field": (card(lambda c: c.update(extra=1)), "extra: Extra inputs"),
    "no JSON": (lambda f: (f / CARD).write_text("{"), "card.json"),
    "no promise": (card(lambda c: c.pop("expected")), "expected: Field required"),
    "no setting": (card(lambda c: c["settings"].pop("shared")), "settings.shared: Field required"),
    "nothing shared": (card(lambda c: c["settings"].update(shared=0)), "settings.shared: Input should be greater than 0"),
    "negative sinks": (card(lambda c: c.update(sinks=-1)), "sinks: Input should be greater than or equal to 0"),
    "no window": (card(lambda c: c.pop("window")), "window: Field required"),
    "no slots": (card(lambda c: c.update(slots=[])), "slots: List should have at least 1 item"),
    "third slot": (slot(1, slot=2), "slots.1.slot: Input should be 0 or 1"),
    "no heads": (slot(0, heads=0), "slots.0.heads: Input should be greater than 0"),
    "no bundles": (slot(0, bundles=[]), "slots.0.bundles: List should have at least 1 item"),
    "seven": (bundle(0, eight=7), "slots.0.bundles.0.eight: Input should be a multiple of 8"),
    "negative": (bundle(0, four=-8), "slots.0.bundles.0.four: Input should be greater than or equal to 0"),
    "huge": (bundle(0, two=2**20 + 8), "slots.0.bundles.0.two: Input should be less than or equal to 1048576"),
    "slot lost": (card(lambda c: c["slots"].pop()), SLOTS),
    "slot twice": (card(lambda c: c["slots"].append(c["slots"][-1])), SLOTS),
    "slots swapped": (card(lambda c: c["slots"].reverse()), SLOTS),
    "layers mixed": (card(lambda c: c["slots"].sort(key=lambda s: s["slot"])), SLOTS),
    "uneven bundles": (slot(2, heads=3), "layer 2, slot 0: 3 heads cannot be 2 bundles"),
    "more bundles than heads": (
        card(lambda c: c["slots"][1].update(bundles=c["slots"][1]["bundles"] * 3)),
        "layer 0, slot 1: 2 heads cannot be 3 bundles",
    ),
    "more of six bits than digits": (
        bundle(3, six=9),
        "layer 2, slot 1: more coefficients have 6 bits than there are digits of 4 and of 2",
    ),
    "too many coefficients": (
        bundle(3, two=32),
        "layer 2, slot 1: a bundle has more coefficients than numbers",
    ),
    "rotated twice": (card(lambda c: c["rotations"].append(c["rotations"][0])), "a layer is rotated twice"),
    "both slots rotated": (
        card(lambda c: c["rotations"].append(c["rotations"][0] | {"slot": 1})),
        "a layer is rotated twice",
    ),
    "too many pairs": (rotation(pairs=5), "layer 2, slot 0 has no 5 pairs to rotate"),
    "no such layer": (rotation(layer_idx=1), "layer 1, slot 0 has no 3 pairs to rotate"),
    "no scale": (rotation(scale=0), "rotations.0.scale: Input should be greater than 0"),
    "endless scale": (rotation(scale="inf"), "rotations.0.scale: Input should be a finite number"),
    "pairing": (rotation(pairing="thirds"), "rotations.0.pairing: Input should be 'half', 'interleaved' or 'split'"),
}
TENSOR_DAMAGES: dict[str, tuple[Damage, str]] = {
    "no file": (lambda folder: (folder / TENSORS).unlink(), "cannot be read (No such file"),
    "cut": (lambda f: (f / TENSORS).write_bytes((f / TENSORS).read_bytes()[:-1]), "does not match card.json"),
    "lost": (tensors(lambda t: t.pop("0.1.mean")), "tensor 0.1.mean is missing"),
    "turning lost": (tensors(lambda t: t.pop("2.0.turning")), "tensor 2.0.turning is missing"),
    "frequencies lost": (tensors(lambda t: t.pop("rotation.2.0.frequencies")), "rotation.2.0.frequencies is missing"),
    "rotation lost": (card(lambda c: c.update(rotations=[])), "tensor 2.0.turning is not of this codec"),
    "rotation moved": (rotation(slot=1), "tensor 2.1.turning is missing"),
    "unknown": (tensors(lambda t: t.update(x=torch.zeros(1))), "tensor x is not of this codec"),
    "dtype": (put("0.0.mean", Tensor.half), "0.0.mean is torch.float16 [2, 8], the card says torch.float32 [2, 8]"),
    "encoder's shape": (
        put("0.1.encoder", lambda x: x[:, 8:]),
        "0.1.encoder is torch.float32 [1, 24, 32], the card says torch.float32 [1, 32, 32]",
    ),
    "decoder turned": (
        put("2.0.decoder", lambda x: x[:1]),
        "2.0.decoder is torch.float32 [1, 8, 8], the card says torch.float32 [2, 8, 8]",
    ),
    "fewer coefficients": (bundle(1, four=8), "0.1.encoder is torch.float32 [1, 32, 32], the card says"),
    "longer heads": (slot(3, dim=32), "2.1.encoder is torch.float32 [1, 32, 32], the card says"),
    "frequencies' dtype": (put("rotation.2.0.frequencies", Tensor.float), "frequencies is torch.float32 [3], the card says"),
    "fewer pairs": (rotation(pairs=2), "rotation.2.0.frequencies is torch.float64 [3], the card says torch.float64 [2]"),
    "windows": (put("calibration.windows", lambda x: x[1:]), "tensor calibration.windows is torch.int64 [2], the card says"),
    "NaN": (at("2.1.decoder", (0, 3, 1), torch.nan), "tensor 2.1.decoder holds NaN or infinite values"),
    "infinite": (at("2.0.turning", (1, 1), torch.inf), "tensor 2.0.turning holds NaN or infinite values"),
    "NaN turns": (at("rotation.2.0.frequencies", 0, torch.nan), "rotation.2.0.frequencies holds NaN or infinite values"),
}
DAMAGES = {(CARD, n): d for n, d in CARD_DAMAGES.items()} | {(TENSORS, n): d for n, d in TENSOR_DAMAGES.items()}


@pytest.mark.parametrize(("at_fault", "damage"), DAMAGES.items(), ids=[" ".join(key) for key in DAMAGES])
def test_a_damaged_codec_is_refused_naming_the_file_and_what_is_wrong(
    at_fault: tuple[str, str], damage: tuple[Damage, str], tmp_path: Path
) -> None:
    folder = saved(tmp_path / "codec")
    change, says = damage
    change(folder)
    assert_refused(folder, at_fault[0], says)


def test_coefficients_of_six_bits_survive_and_are_one_each_of_what_heads_may_have(tmp_path: Path) -> None:
    codec = planted()
    keys, values = codec.layers[0]
    wide = replace(
        values, widths=(Widths(8, 16, 16),), encoder=torch.ones(1, 40, 32), decoder=torch.ones(1, 40, 32), six=(8,)
    )
    other = replace(codec, layers={0: (keys, wide), 2: codec.layers[2]})
    found = load_codec(saved(tmp_path / "codec", other)).codec
    assert isinstance(found, LiveCodec) and found.layers[0][1].six == (8,)
    assert_alike(other, found)


def test_a_bundle_has_as_many_coefficients_as_numbers_and_no_more(tmp_path: Path) -> None:
    codec = planted()
    keys, values = codec.layers[0]

    def padded(count: int) -> LiveCodec:
        shape = (1, 32 + count, 32)
        wide = replace(values, widths=(Widths(32 + count, 0, 0),), encoder=torch.ones(shape), decoder=torch.ones(shape))
        return replace(codec, layers={0: (keys, wide), 2: codec.layers[2]})

    assert_alike(padded(0), load_codec(saved(tmp_path / "codec", padded(0))).codec)  # type: ignore[arg-type]
    with pytest.raises(CodecError, match="a bundle has more coefficients than numbers"):
        saved(tmp_path / "other", padded(8))


def test_what_could_not_be_read_back_is_not_written(tmp_path: Path) -> None:
    good = planted()
    keys, values = good.layers[2]

    def with_keys(**changed: Any) -> LiveCodec:
        return replace(good, layers={0: good.layers[0], 2: (replace(keys, **changed), values)})

    bad: dict[str, LiveCodec] = {
        "sinks: Input should be greater": replace(good, sinks=-1),
        "slots: List should have at least 1 item": replace(good, layers={}),
        "eight: Input should be a multiple of 8": with_keys(widths=(Widths(7, 0, 0), keys.widths[1])),
        "layer 2, slot 0: 2 heads cannot be 3 bundles": with_keys(widths=(*keys.widths, keys.widths[0])),
        "tensor 2.0.encoder is torch.float32": with_keys(encoder=keys.encoder[:, :4]),
        "tensor 2.0.encoder is torch.float64": with_keys(encoder=keys.encoder.double()),
        "tensor 2.0.mean holds NaN": with_keys(mean=keys.mean * torch.nan),
        "tensor 2.0.turning holds NaN": with_keys(rotated_mean=replace(keys.rotated_mean, mean=keys.mean * torch.inf)),  # type: ignore[type-var]
    }
    for says, codec in bad.items():
        with pytest.raises(CodecError, match=f"planted – ünïcode: cannot be saved: .*{says}"):
            saved(tmp_path / "codec", codec)
    with pytest.raises(CodecError, match="cannot be saved: expected: Field required"):
        save_codec(tmp_path / "codec", good, ABOUT, ORIGIN, WINDOWS)
    with pytest.raises(CodecError, match="cannot be saved: settings"):
        save_codec(tmp_path / "codec", good, EigenCardSettings(**SETTINGS_OF_EIGEN), ORIGIN, WINDOWS, EXPECTED)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["live", "live-six"])  # from before there were coefficients of 6 bits, and with some
def test_a_codec_and_a_packed_cache_of_an_earlier_day_are_read(name: str) -> None:
    """Frozen files, never written again: what they decode to is part of the format."""
    folder = Path(__file__).parent / "saved_codecs"
    codec = load_codec(folder / name).codec
    assert isinstance(codec, LiveCodec)
    assert any(any(heads.six) for both in codec.layers.values() for heads in both) == (name == "live-six")
    held, expected = (load_file(folder / f"{name}-{what}.safetensors") for what in ("cache", "decoded"))
    decoded = codec.decode(Encoded(held, 0, 75))
    assert {f"{i}.{slot}" for i, both in decoded.items() for slot in range(len(both))} == expected.keys()
    for i, both in decoded.items():
        for slot, x in enumerate(both):
            torch.testing.assert_close(x[:, :, ::7], expected[f"{i}.{slot}"], rtol=1e-5, atol=1e-4)


def test_the_live_part_of_a_folder_is_found(tmp_path: Path) -> None:
    folder = saved_pca(tmp_path / "codec")
    saved(folder / LIVE)
    assert_alike(planted(), load_live(folder).codec)  # type: ignore[arg-type]
    assert load_live(folder).folder == folder / LIVE
    assert isinstance(load_codec(folder).codec, PCACodec)


def test_a_folder_without_a_live_part_says_how_to_come_by_one(tmp_path: Path) -> None:
    folder = saved_pca(tmp_path / "codec")
    with pytest.raises(CodecError) as error:
        load_live(folder)
    assert str(error.value) == f"{folder}: has no codec for a live cache: fit it again with `eigencache fit --live`"


def test_a_folder_that_does_not_exist_and_an_empty_one_are_named(tmp_path: Path) -> None:
    for folder in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(CodecError) as error:
            load_live(folder)
        assert str(error.value) == f"{folder}: holds no codec: fit one with `eigencache fit --live`"


def test_a_damaged_live_part_is_named_by_its_own_file(tmp_path: Path) -> None:
    folder = saved_pca(tmp_path / "codec")
    at("0.0.mean", (0, 0), torch.nan)(saved(folder / LIVE))
    with pytest.raises(CodecError) as error:
        load_live(folder)
    assert str(error.value).startswith(f"{folder / LIVE / TENSORS}: tensor 0.0.mean holds NaN")
    shutil.rmtree(folder / LIVE)
    (folder / LIVE).mkdir()
    with pytest.raises(CodecError, match="live: holds no codec"):
        load_live(folder)


def test_a_stored_codec_with_a_live_one_inside_is_replaced_and_other_things_are_not(tmp_path: Path) -> None:
    folder = saved_pca(tmp_path / "codec")
    saved(folder / LIVE)
    check_replaceable(folder)
    check_replaceable(folder / LIVE)
    saved(folder / LIVE, planted(seed=1))
    assert_alike(planted(seed=1), load_live(folder).codec)  # type: ignore[arg-type]
    saved_pca(folder)
    assert {entry.name for entry in folder.iterdir()} == {CARD, TENSORS}  # the live codec was of what is replaced
    saved(folder / LIVE)
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match="holds other files than a codec and was not changed"):
        check_replaceable(folder)
    (folder / "notes.txt").unlink()
    (folder / LIVE / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match=f"{folder / LIVE}: holds other files than a codec and was not changed"):
        saved_pca(folder)
    assert (folder / LIVE / "notes.txt").read_text() == "mine"
    shutil.rmtree(folder / LIVE)
    (folder / LIVE).write_text("mine")
    with pytest.raises(OutputError, match=f"{folder / LIVE}: is a file: name a folder"):
        saved_pca(folder)
    only = tmp_path / "only"
    saved(only / LIVE)
    with pytest.raises(OutputError, match="holds other files than a codec and was not changed"):
        check_replaceable(only)
