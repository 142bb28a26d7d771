"""A saved codec comes back bit for bit; a damaged folder is refused by name, and nothing but a codec is overwritten."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from codec_folders import ORIGIN, WINDOWS, assert_refused, card, rehash, tensors
from eigencache.calibration.session import Session
from eigencache.codec.pca import Part, PCACodec, PCAGroup
from eigencache.codec.saved.folder import CARD, TENSORS, load_codec, save_codec
from eigencache.codec.saved.pca import PCACard, PCACardSettings
from eigencache.errors import CodecError, OutputError
from eigencache.evaluate.prefix import read_prefix
from eigencache.fitting.pca import PCACalibration
from eigencache.fitting.pca_settings import PCASettings, targets_of
from eigencache.fitting.provenance import fitting_of
from eigencache.spectral.rope import PAIRINGS, Rotation
from eigencache.spectral.transform import Transform
from stub_codecs import random_sequences, tiny_loaded
from tiny_models import token_ids

pytestmark = pytest.mark.slow

DIM = 8


def drawn(width: int, rank: int, seed: int = 0) -> Transform:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((width,), (width, rank), (rank, width), (width,))
    return Transform(*(torch.randn(shape, generator=generator) for shape in shapes))


def planted(rank: int = 3, layers: int = 2, heads: int = 2, bits: int = 16, shared: bool = True) -> PCACodec:
    """Keys of every head, before rotation, and values of whole layers."""
    one = drawn(DIM, rank)
    keys = [
        PCAGroup((Part(i, 0, (h, h + 1), DIM),), one if shared else drawn(DIM, rank, h))
        for i in range(layers)
        for h in range(heads)
    ]
    values = [PCAGroup((Part(i, 1, (0, heads), DIM),), drawn(heads * DIM, rank, i)) for i in range(layers)]
    rotation = Rotation(10.0 ** (-torch.arange(4, dtype=torch.float64)), 1.1, "half")
    return PCACodec("planted", (*keys, *values), dict.fromkeys(range(layers), (0, rotation)), torch.float32, bits)  # type: ignore[arg-type]


def about(codec: PCACodec) -> PCACardSettings:
    return PCACardSettings(**PCASettings("kv", sinks=codec.sinks).__dict__, bits=codec.bits, rank=codec.rank)


def saved(folder: Path, codec: PCACodec | None = None) -> Path:
    codec = codec or planted()
    save_codec(folder, codec, about(codec), ORIGIN, WINDOWS)
    return folder


def assert_alike(codec: PCACodec, other: PCACodec, cached: dict[int, tuple[Tensor, Tensor]]) -> None:
    assert (other.name, other.bits, other.dtype, other.nbytes) == (codec.name, codec.bits, codec.dtype, codec.nbytes)
    for stretch in (cached, {i: (k[:, :, 5:6], v[:, :, 5:6]) for i, (k, v) in cached.items()}):
        encoded, again = codec.encode(stretch, 3), other.encode(stretch, 3)
        assert encoded.tensors.keys() == again.tensors.keys()
        assert all(torch.equal(x, again.tensors[name]) for name, x in encoded.tensors.items())
        decoded, once_more = codec.decode(encoded), other.decode(again)
        assert decoded.keys() == once_more.keys()
        assert all(torch.equal(a, b) for i in decoded for a, b in zip(decoded[i], once_more[i], strict=True))


@functools.cache
def calibration(name: str) -> PCACalibration:
    return PCACalibration(Session(tiny_loaded(name)), random_sequences(*(64,) * 32), scopes=("head", "layer", "all"))


@functools.cache
def cache_of(name: str) -> dict[int, tuple[Tensor, Tensor]]:
    with torch.no_grad():
        return read_prefix(tiny_loaded(name), token_ids()).stored


@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize("way", ["head", "layer", "all", "pooled", "post", "uncentered"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "deepseek_v2"])  # GQA with RoPE, learned positions, MLA
def test_what_is_loaded_encodes_bit_for_bit_and_holds_as_many_bytes(name: str, way: str, bits: int, tmp_path: Path) -> None:
    for target in targets_of(calibration(name).session.loaded):
        chosen = PCASettings(
            target,
            way if way in ("layer", "all") else "head",  # type: ignore[arg-type]
            "post" if way == "post" else "pre",
            centered=way != "uncentered",
            basis="pooled" if way == "pooled" else "fitted",
        )
        full = calibration(name).fit(chosen)
        for codec in (full.truncated(full.rank, bits=bits), full.truncated(3, bits=bits)):  # type: ignore[arg-type]
            save_codec(tmp_path / "codec", codec, *fitting_of(codec, chosen, calibration(name)))
            assert_alike(codec, load_codec(tmp_path / "codec").codec, cache_of(name))


def test_bases_that_were_fitted_column_by_column_multiply_as_they_are_stored(tmp_path: Path) -> None:
    one = drawn(64, 64)
    columns = Transform(one.mean, one.encoder.mT.contiguous().mT, one.decoder.mT.contiguous().mT, one.spectrum)
    codec = PCACodec("v", (PCAGroup((Part(0, 1, (0, 1), 64),), columns),), {}, torch.float32)
    again = load_codec(saved(tmp_path / "codec", codec)).codec
    (before,), (after,) = codec.groups, again.groups
    for row in torch.randn(50, 1, 64):
        y = before.transform.encode(row)
        assert torch.equal(y, after.transform.encode(row))
        assert torch.equal(before.transform.decode(y), after.transform.decode(y))


@settings(derandomize=True, deadline=None, max_examples=30)
@given(
    st.integers(1, 8), st.integers(1, 3), st.integers(1, 3), st.sampled_from([16, 8, 4]), st.booleans(),
    st.floats(0.1, 9), st.sampled_from(PAIRINGS),
)  # fmt: skip
def test_any_codec_survives(rank, layers, heads, bits, shared, scale, pairing) -> None:
    codec = planted(rank, layers, heads, bits, shared)
    rotation = Rotation(codec.rotations[0][1].frequencies, scale, pairing)
    codec = PCACodec("a – ünïcode", codec.groups, {0: (0, rotation)}, torch.float64, bits)
    cached = {i: (torch.randn(1, heads, 9, DIM), torch.randn(1, heads, 9, DIM)) for i in range(layers)}
    with tempfile.TemporaryDirectory() as folder:
        origin = ORIGIN.model_copy(update={"dtype": "float64"})
        save_codec(Path(folder, "codec"), codec, about(codec), origin, WINDOWS)
        assert_alike(codec, load_codec(Path(folder, "codec")).codec, cached)


def test_the_card_says_what_it_was_given_and_shared_transforms_are_shared_again(tmp_path: Path) -> None:
    codec = planted()
    found = load_codec(saved(tmp_path / "codec", codec))
    assert (found.card.origin, found.card.settings, found.card.kind) == (ORIGIN, about(codec), "pca")
    assert found.windows.dtype == np.uint64 and (found.windows == WINDOWS).all()
    assert [id(g.transform) == id(found.codec.groups[0].transform) for g in found.codec.groups] == [True] * 4 + [False] * 2
    assert len(load_file(tmp_path / "codec" / TENSORS)) == 3 * 4 + 2 + 1
    assert PCACard.load(tmp_path / "codec" / CARD) == found.card


def no_tensors(folder: Path) -> None:
    (folder / TENSORS).write_bytes(b"no tensors at all")
    rehash(folder)


def flipped(folder: Path) -> None:
    data = bytearray((folder / TENSORS).read_bytes())
    data[-1] ^= 1
    (folder / TENSORS).write_bytes(data)


DAMAGES: dict[str, tuple[str, Callable[[Path], Any], str]] = {
    "no card": (CARD, lambda folder: (folder / CARD).unlink(), "is missing: copy the whole folder"),
    "no JSON": (CARD, lambda folder: (folder / CARD).write_bytes(b"\xff{"), "Invalid JSON"),
    "no record": (CARD, lambda folder: (folder / CARD).write_text("[]"), "not a record of schema eigencache.codec/1"),
    "another schema": (
        CARD,
        card(lambda c: c.update(schema_version="eigencache.codec/2")),
        "should be 'eigencache.codec/1'",
    ),
    "another kind": (
        CARD,
        card(lambda c: c.update(kind="zip")),
        "kind 'zip' is unknown to this version, which reads eigen, live, pca",
    ),
    "lost field": (CARD, card(lambda c: c["origin"].pop("rope_sha256")), "origin.rope_sha256: Field required"),
    "unknown field": (CARD, card(lambda c: c.update(extra=1)), "extra: Extra inputs"),
    "no such dtype": (CARD, card(lambda c: c["origin"].update(dtype="int3")), "origin.dtype: Input should be"),
    "negative layer": (CARD, card(lambda c: c["groups"][0]["parts"][0].update(layer_idx=-1)), "groups.0.parts.0.layer_idx"),
    "no groups": (CARD, card(lambda c: c.update(groups=[])), "groups: List should have at least 1 item"),
    "infinite scale": (CARD, card(lambda c: c["rotations"][0].update(scale="inf")), "rotations.0.scale"),
    "head twice": (CARD, card(lambda c: c["groups"].append(c["groups"][0])), "do not cover the heads of layer 0, slot 0"),
    "head lost": (CARD, card(lambda c: c["groups"].pop(0)), "do not cover the heads of layer 0, slot 0 once each"),
    "heads backward": (
        CARD,
        card(lambda c: c["groups"][4]["parts"][0].update(heads=[2, 0])),
        "do not cover the heads of layer 0, slot 1 once each",
    ),
    "two widths": (CARD, card(lambda c: c["groups"][1]["parts"][0].update(dim=4)), "do not cover the heads"),
    "rank too high": (CARD, card(lambda c: c["groups"][5].update(rank=17)), "transform 2 has rank 17 in 16 dimensions"),
    "unlike groups": (CARD, card(lambda c: c["groups"][5].update(transform=0)), "several widths or ranks share transform 0"),
    "rotated twice": (CARD, card(lambda c: c["rotations"][1].update(layer_idx=0)), "a layer is rotated twice"),
    "rotated elsewhere": (CARD, card(lambda c: c["rotations"][0].update(layer_idx=7)), "layer 7, slot 0 has no 4 pairs"),
    "too many pairs": (CARD, card(lambda c: c["rotations"][0].update(pairs=5)), "layer 0, slot 0 has no 5 pairs"),
    "no tensor file": (TENSORS, lambda folder: (folder / TENSORS).unlink(), "cannot be read (No such file"),
    "cut short": (
        TENSORS,
        lambda f: (f / TENSORS).write_bytes((f / TENSORS).read_bytes()[:-9]),
        "does not match card",
    ),
    "one bit": (TENSORS, flipped, "does not match card.json (sha256 "),
    "no tensors": (TENSORS, no_tensors, "not a safetensors file ("),
    "tensor lost": (TENSORS, tensors(lambda t: t.pop("transform.1.mean")), "tensor transform.1.mean is missing"),
    "unknown tensor": (TENSORS, tensors(lambda t: t.update(x=torch.zeros(1))), "tensor x is not of this codec"),
    "another shape": (
        TENSORS,
        tensors(lambda t: t.update({"transform.0.mean": torch.zeros(9)})),
        "tensor transform.0.mean is torch.float32 [9], the card says torch.float32 [8]",
    ),
    "another dtype": (
        TENSORS,
        tensors(lambda t: t.update({"transform.0.encoder": t["transform.0.encoder"].double()})),
        "tensor transform.0.encoder is torch.float64 [8, 3], the card says torch.float32 [8, 3]",
    ),
    "NaN": (TENSORS, tensors(lambda t: t["transform.2.decoder"].fill_(torch.nan)), "transform.2.decoder holds NaN or inf"),
    "infinite": (
        TENSORS,
        tensors(lambda t: t["rotation.1.0.frequencies"].fill_(torch.inf)),
        "tensor rotation.1.0.frequencies holds NaN or infinite values",
    ),
    "fewer windows": (
        TENSORS,
        tensors(lambda t: t.update({"calibration.windows": torch.zeros(1, dtype=torch.int64)})),
        "tensor calibration.windows is torch.int64 [1], the card says torch.int64 [3]",
    ),
}


@pytest.mark.parametrize(("file", "damage", "says"), DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_codec_is_refused_naming_the_file_and_what_is_wrong(
    file: str, damage: Callable[[Path], Any], says: str, tmp_path: Path
) -> None:
    folder = saved(tmp_path / "codec")
    damage(folder)
    assert_refused(folder, file, says)


def test_a_folder_that_an_earlier_release_wrote_is_read() -> None:
    """The folder is frozen: it was written before there were several kinds of codecs, and is never written again."""
    found = load_codec(Path(__file__).parent / "saved_codecs" / "pca")
    assert (found.card.kind, found.codec.name, found.codec.rank, found.coded_bits) == ("pca", "planted", 2, None)
    assert torch.equal(found.codec.groups[0].transform.encoder, drawn(DIM, 2).encoder)
    cached = {i: (torch.randn(1, 2, 9, DIM), torch.randn(1, 2, 9, DIM)) for i in range(2)}
    assert_alike(planted(rank=2, bits=8), found.codec, cached)


def test_a_folder_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(CodecError, match=f"{tmp_path / 'absent'}: no such folder: name one that"):
        load_codec(tmp_path / "absent")


@settings(derandomize=True, deadline=None, max_examples=60)
@given(st.data())
def test_no_changed_byte_of_the_tensors_goes_unseen(data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = saved(Path(folder, "codec")) / TENSORS
        content = bytearray(path.read_bytes())
        content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
        path.write_bytes(content)
        with pytest.raises(CodecError, match="does not match card"):
            load_codec(path.parent)


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_a_codec_is_replaced_and_a_new_place_is_made(tmp_path: Path) -> None:
    folder = saved(tmp_path / "a" / "new" / "place")
    saved(folder, planted(rank=2))
    assert load_codec(folder).codec.rank == 2
    assert sorted(tree(tmp_path)) == [f"a/new/place/{CARD}", f"a/new/place/{TENSORS}"]
    assert not [entry for entry in folder.parent.iterdir() if entry != folder]
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    assert load_codec(saved(tmp_path / "link")).codec.rank == 3
    assert (tmp_path / "link").is_symlink()


@pytest.mark.parametrize(
    "files",
    [
        {"notes.txt": "mine"},
        {CARD: "{}", TENSORS: ""},
        {CARD: '{"schema_version": "eigencache.probe/1"}', TENSORS: ""},
        {CARD: "no JSON", TENSORS: ""},
        {CARD: '{"schema_version": "eigencache.codec/1"}'},
        {CARD: '{"schema_version": "eigencache.codec/1"}', TENSORS: "", "notes.txt": "mine"},
    ],
    ids=lambda files: " ".join(files),
)
def test_a_folder_that_is_no_codec_is_never_touched(files: dict[str, str], tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    for name, text in files.items():
        (folder / name).write_text(text)
    before = tree(tmp_path)
    with pytest.raises(OutputError, match=f"{folder}: holds other files than a codec and was not changed"):
        saved(folder)
    assert tree(tmp_path) == before


def test_a_file_is_never_touched_and_no_folder_made_below_it(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OutputError, match="is a file: name a folder"):
        saved(tmp_path / "file")
    with pytest.raises(OutputError, match=r"below: cannot be written \(.*\): choose another folder"):
        saved(tmp_path / "file" / "below")
    assert tree(tmp_path) == {"file": b"mine"}


@pytest.mark.parametrize("older", [False, True])
@pytest.mark.parametrize("moment", ["write_bytes", "rename"])
@pytest.mark.parametrize("interruption", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=type)
def test_an_interrupted_save_leaves_what_was_there(
    interruption: BaseException, moment: str, older: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "codec"
    if older:
        saved(folder)
    before, calls = tree(tmp_path), []
    real = getattr(Path, moment)

    def second_fails(path: Path, *given: Any) -> Any:
        calls.append(path)
        if len(calls) == (2 if older or moment == "write_bytes" else 1):
            raise interruption
        return real(path, *given)

    monkeypatch.setattr(Path, moment, second_fails)
    with pytest.raises(OutputError if isinstance(interruption, OSError) else KeyboardInterrupt):
        saved(folder, planted(rank=2))
    assert tree(tmp_path) == before
    assert {entry.name for entry in tmp_path.iterdir()} == ({"codec"} if older else set())


def test_what_could_not_be_read_back_is_not_written(tmp_path: Path) -> None:
    good = planted()
    bad = {
        "holds NaN": PCAGroup(good.groups[0].parts, Transform(*(x * torch.nan for x in vars(drawn(DIM, 3)).values()))),
        "the card says": PCAGroup(good.groups[0].parts, drawn(DIM, 3).to(torch.float64)),
        "do not cover": good.groups[1],
    }
    for says, group in bad.items():
        with pytest.raises(CodecError, match=f"planted: cannot be saved: .*{says}"):
            saved(tmp_path / "codec", PCACodec("planted", (group, *good.groups[1:]), good.rotations, torch.float32))
    assert not list(tmp_path.iterdir())


def test_a_card_that_was_changed_is_refused_though_its_fields_are_sound(tmp_path: Path) -> None:
    folder = saved(tmp_path / "codec")
    card(lambda c: c.update(name="another"))(folder)
    with pytest.raises(CodecError, match=r"card\.json: was changed after it was written: save the codec again"):
        load_codec(folder)
    card(lambda c: c.pop("card_sha256"))(folder)  # as cards of earlier versions have none
    assert load_codec(folder).codec.name == "another"


def test_the_folder_that_the_shell_is_in_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = saved(tmp_path / "codec")
    for place in (folder, tmp_path):
        monkeypatch.chdir(folder)
        with pytest.raises(OutputError, match="would replace the current directory"):
            saved(place)
    assert load_codec(folder)


@pytest.mark.parametrize("name", [".DS_Store", "Thumbs.db"])
def test_what_a_file_manager_leaves_is_no_obstacle(name: str, tmp_path: Path) -> None:
    folder = saved(tmp_path / "codec")
    (folder / name).write_bytes(b"")
    saved(folder)
    assert load_codec(folder)
