"""A fitted codec as a folder of two files: its tensors in `codec.safetensors`, what they are in `card.json`.

What is read back encodes bit for bit like what was written and holds as many bytes. A damaged folder is refused by the
name of the file at fault, before anything is decoded.
"""

import hashlib
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from eigencache.codec.card import CodecCard, CodecOrigin, CodecSettings
from eigencache.codec.pca import PCACodec
from eigencache.codec.tensors import WINDOWS, card_fault, card_groups, card_rotations, codec_from, tensor_fault, tensors_of
from eigencache.errors import CodecError, OutputError, RecordError

CARD, TENSORS = "card.json", "codec.safetensors"


@dataclass(frozen=True, eq=False)
class SavedCodec:
    """A codec that was read from `folder`; `windows`: hashes of its calibration text, ascending, uint64."""

    folder: Path
    codec: PCACodec
    card: CodecCard
    windows: np.ndarray


def save_codec(
    folder: str | Path, codec: PCACodec, settings: CodecSettings, origin: CodecOrigin, windows: np.ndarray
) -> None:
    """Write both files or none; a codec that lies there is replaced, anything else is never touched.

    `windows`: sketch of the calibration text (`corpora.overlap.sketch`), uint64. Raises `OutputError` for a folder that
    holds other things or cannot be written, `CodecError` for a codec that could not be read back.
    """
    folder = Path(folder)
    check_replaceable(folder)
    tensors = tensors_of(codec) | {WINDOWS: torch.from_numpy(windows.view(np.int64).copy())}
    data = save(tensors)
    card = CodecCard(
        name=codec.name,
        settings=settings,
        origin=origin,
        tensors_sha256=hashlib.sha256(data).hexdigest(),
        groups=card_groups(codec),
        rotations=card_rotations(codec),
        windows=len(windows),
    )
    if fault := card_fault(card) or tensor_fault(card, tensors):
        raise CodecError(f"{codec.name}: cannot be saved: {fault}")
    _write(folder, {TENSORS: data, CARD: card.model_dump_json(indent=1).encode()})


def load_codec(folder: str | Path) -> SavedCodec:
    """What `save_codec` wrote. Raises `CodecError` naming the file that is missing, damaged or of another version."""
    folder = Path(folder)
    if not folder.is_dir():
        raise CodecError(f"{folder}: no such folder: name one that `eigencache evaluate --save-codec` wrote")
    try:
        card = CodecCard.load(folder / CARD)
    except RecordError as error:
        raise CodecError(f"{error}: save the codec again with this version") from error
    if fault := card_fault(card):
        raise CodecError(f"{folder / CARD}: {fault}: save the codec again")
    tensors = _read_tensors(folder / TENSORS, card)
    windows = tensors[WINDOWS].numpy().view(np.uint64).copy()
    return SavedCodec(folder, codec_from(card, tensors), card, windows)


def check_replaceable(folder: Path) -> None:
    """Raises `OutputError` for a file, and for a folder that holds anything but a codec."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise OutputError(f"{folder}: is a file: name a folder")
    try:
        names = {entry.name for entry in folder.iterdir()}
    except OSError as error:
        raise OutputError(f"{folder}: cannot be read ({error.strerror}): name another folder") from error
    if names and (names != {CARD, TENSORS} or not _is_card(folder / CARD)):
        raise OutputError(f"{folder}: holds other things than a codec and is left alone: name another folder")


def _is_card(path: Path) -> bool:
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and str(content.get("schema_version")).startswith("eigencache.codec/")


def _read_tensors(path: Path, card: CodecCard) -> dict[str, Tensor]:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CodecError(f"{path}: cannot be read ({error.strerror}): save the codec again") from error
    found = hashlib.sha256(data).hexdigest()
    if found != card.tensors_sha256:
        raise CodecError(
            f"{path}: is not the file that {CARD} was written with (sha256 {found[:12]}, not {card.tensors_sha256[:12]}): "
            "save the codec again"
        )
    try:
        tensors = load(data)
    except (SafetensorError, KeyError, ValueError, RuntimeError) as error:  # by what is wrong with the header
        raise CodecError(f"{path}: no file of tensors ({error}): save the codec again") from error
    if fault := tensor_fault(card, tensors):
        raise CodecError(f"{path}: {fault}: save the codec again")
    return tensors


def _write(folder: Path, files: dict[str, bytes]) -> None:
    """The files in a new folder, which takes the place of the old one only when it is complete."""
    try:
        place = folder.resolve()  # of a link, what it leads to
        place.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=place.parent, prefix=f".{place.name}.") as temporary:
            new, old = Path(temporary, "new"), Path(temporary, "old")
            new.mkdir()
            for name, data in files.items():
                (new / name).write_bytes(data)
            try:
                if place.exists():
                    place.rename(old)
                new.rename(place)
            except BaseException:
                if old.exists() and not place.exists():
                    old.rename(place)
                raise
    except OSError as error:
        raise OutputError(f"{folder}: cannot be written ({error.strerror}): choose another folder") from error
