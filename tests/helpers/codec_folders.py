"""Origin of a saved codec for tests, and ways to damage its files without the classes that wrote them."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file, save_file
from torch import Tensor

from eigencache.codec.saved.card import CodecOrigin
from eigencache.codec.saved.folder import CARD, TENSORS, load_codec
from eigencache.errors import CodecError
from planted_sweeps import CORPUS, RUN

ORIGIN = CodecOrigin(
    model="planted-model", model_sha256="1" * 64, rope_sha256="2" * 64, dtype="float32", calibration=CORPUS, run=RUN
)
WINDOWS = np.array([3, 5, 2**64 - 1], dtype=np.uint64)
Damage = Callable[[Path], Any]


def card(change: Callable[[Any], Any]) -> Damage:
    """Return a function that changes the card of a folder."""

    def damage(folder: Path) -> None:
        content = json.loads((folder / CARD).read_text(encoding="utf-8"))
        change(content)
        (folder / CARD).write_text(json.dumps(content), encoding="utf-8")

    return damage


def rehash(folder: Path) -> None:
    sha256 = hashlib.sha256((folder / TENSORS).read_bytes()).hexdigest()
    card(lambda c: c.update(tensors_sha256=sha256))(folder)


def tensors(change: Callable[[dict[str, Tensor]], Any]) -> Damage:
    """Return a function that changes the tensors of a folder and updates their hash in the card."""

    def damage(folder: Path) -> None:
        content = load_file(folder / TENSORS)
        change(content)
        save_file(content, folder / TENSORS)
        rehash(folder)

    return damage


def put(name: str, change: Callable[[Tensor], Tensor]) -> Damage:
    """Return a function that replaces one tensor."""
    return tensors(lambda t: t.update({name: change(t[name]).contiguous()}))


def at(name: str, place: Any, value: float) -> Damage:
    """Return a function that changes numbers of a tensor."""
    return tensors(lambda t: t[name].__setitem__(place, value))


def assert_refused(folder: Path, file: str, says: str) -> None:
    """Assert that loading fails with one line that names the file, what is wrong and what to do."""
    with pytest.raises(CodecError) as error:
        load_codec(folder)
    assert str(error.value).startswith(f"{folder / file}: ")
    assert says in str(error.value)
    assert "save the codec again" in str(error.value)
    assert "\n" not in str(error.value)
