"""A saved codec is one file and one registration: a toy kind, defined here alone, is saved, listed, loaded and counted."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from codec_folders import ORIGIN, WINDOWS, put
from eigencache.codec.base import Cached, Encoded, length_of
from eigencache.codec.byte_ledger import ledger, paid_back_at
from eigencache.codec.saved import registry
from eigencache.codec.saved.card import CodecCard
from eigencache.codec.saved.folder import load_codec, save_codec
from eigencache.codec.saved.registry import Fault, SavedKind, TensorKind, Tensors, kind_of, saved_codec, saved_kinds
from eigencache.errors import CodecError
from eigencache.records.base import Record


@dataclass(frozen=True, eq=False)
class Offset:
    """The cache minus a mean, in 16 bits: the smallest codec with a tensor of its own."""

    name: str
    mean: Tensor

    @property
    def nbytes(self) -> int:
        return self.mean.nbytes

    def to(self, device: str | torch.device) -> Offset:
        return replace(self, mean=self.mean.to(device))

    def encode(self, cached: Cached, start: int) -> Encoded:
        tensors = {f"{i}.{slot}": (x - self.mean).half() for i, both in cached.items() for slot, x in enumerate(both)}
        return Encoded(tensors, start, length_of(cached))

    def decode(self, encoded: Encoded) -> dict[int, tuple[Tensor, Tensor]]:
        slots = {name: x.float() + self.mean for name, x in encoded.tensors.items()}
        return {0: (slots["0.0"], slots["0.1"])}


class OffsetSettings(Record):
    about: str


class OffsetCard(CodecCard):
    kind: Literal["toy"] = "toy"  # type: ignore[assignment]
    settings: OffsetSettings
    width: int


class SavedOffset(SavedKind):
    codec, card = Offset, OffsetCard

    def entries(self, codec: Offset) -> dict[str, Any]:
        return {"rotations": [], "width": len(codec.mean)}

    def tensors(self, codec: Offset) -> dict[str, Tensor]:
        return {"mean": codec.mean}

    def tensor_kinds(self, card: OffsetCard) -> dict[str, TensorKind]:
        return {"mean": (torch.float32, (card.width,))}

    def codec_from(self, card: OffsetCard, tensors: Tensors) -> Offset:
        return Offset(card.name, tensors["mean"])

    def payload_nbytes(self, codec: Offset, tokens: int, values_per_token: int, coded_bits: float | None) -> int:
        return tokens * values_per_token

    def value_fault(self, card: OffsetCard, tensors: Tensors) -> Fault:
        return "the mean is negative" if (tensors["mean"] < 0).any() else None


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(registry, "_KINDS", saved_kinds())
    saved_codec("toy")(SavedOffset)
    yield


def test_the_kinds_of_this_package_are_registered() -> None:
    assert {"pca", "eigen", "live", "toy"} == set(saved_kinds())


def test_a_codec_of_a_new_kind_is_saved_loaded_and_counted(tmp_path: Path) -> None:
    codec = Offset("offset", torch.arange(4.0))
    save_codec(tmp_path / "codec", codec, OffsetSettings(about="a toy"), ORIGIN, WINDOWS)
    found = load_codec(tmp_path / "codec")
    assert isinstance(found.codec, Offset) and isinstance(found.card, OffsetCard)
    assert (found.card.kind, found.card.settings.about, found.codec.name, found.coded_bits) == (
        "toy",
        "a toy",
        "offset",
        None,
    )
    cached = {0: (torch.randn(1, 1, 5, 4), torch.randn(1, 1, 5, 4))}
    assert torch.equal(found.codec.encode(cached, 0).tensors["0.1"], codec.encode(cached, 0).tensors["0.1"])
    (row,) = ledger(found.codec, 8, (100,))
    assert (row.payload_nbytes, row.basis_nbytes, row.ratio) == (800, 16, 2.0)
    assert paid_back_at(found.codec, 8) == 3


def test_the_checks_of_a_new_kind_are_run(tmp_path: Path) -> None:
    save_codec(tmp_path / "codec", Offset("offset", torch.ones(4)), OffsetSettings(about=""), ORIGIN, WINDOWS)
    put("mean", lambda mean: -mean)(tmp_path / "codec")
    with pytest.raises(CodecError, match=r"codec\.safetensors: the mean is negative: save the codec again"):
        load_codec(tmp_path / "codec")


def test_a_name_is_registered_once_and_is_that_of_the_cards() -> None:
    with pytest.raises(ValueError, match="'toy' is registered already, by SavedOffset"):
        saved_codec("toy")(SavedOffset)
    with pytest.raises(ValueError, match="cards of OffsetCard have the kind 'toy'"):
        saved_codec("other")(SavedOffset)


def test_a_codec_of_no_kind_cannot_be_saved(tmp_path: Path) -> None:
    with pytest.raises(CodecError, match="a codec of class object cannot be saved: the kinds are eigen, live, pca, toy"):
        kind_of(object())
