"""Saving a fitted codec as a folder of two files, `codec.safetensors` and `card.json`, and loading it.

The loaded codec encodes bit for bit like the saved one. A damaged folder is refused before anything is decoded; the error
names the file at fault.
"""

import hashlib
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from eigencache.codec.saved.card import CardHead, CodecCard, CodecOrigin
from eigencache.codec.saved.registry import (
    AnyCodec,
    Fault,
    SavedKind,
    Tensors,
    kind_of,
    saved_kinds,
    tensor_fault,
)
from eigencache.errors import CodecError, OutputError, RecordError
from eigencache.records.base import Record
from eigencache.records.fit import Expected

CARD, TENSORS, LIVE = "card.json", "codec.safetensors", "live"  # LIVE: the subfolder of the live codec, and its kind
DIGEST = "card_sha256"
_OF_FILE_MANAGERS = {".DS_Store", "Thumbs.db", "desktop.ini"}
WINDOWS = "calibration.windows"


@dataclass(frozen=True, eq=False)
class SavedCodec:
    """A codec that was read from `folder`.

    `windows` are hashes of its calibration text, ascending, uint64 (`corpora.overlap`).
    """

    folder: Path
    codec: AnyCodec
    card: CodecCard
    windows: np.ndarray

    @property
    def coded_bits(self) -> float | None:
        """Expected bits of a coded token; None for a codec whose bytes follow from the number of tokens."""
        return saved_kinds()[self.card.kind].coded_bits(self.card)


def save_codec(
    folder: str | Path,
    codec: AnyCodec,
    settings: Record,
    origin: CodecOrigin,
    windows: np.ndarray,
    expected: Expected | None = None,
    *,
    live: tuple[Any, ...] | None = None,
) -> None:
    """Save a codec; all files are written or none.

    Args:
        folder: Where to; a codec in it is replaced, a folder with anything else is refused.
        codec: A codec of a registered kind.
        settings: The settings of its fit, of the class that the card of its kind requires.
        origin: What it was fitted on.
        windows: Sketch of the calibration text (`corpora.overlap.sketch`), uint64.
        expected: The measurements of its fit; required by kinds whose card has the field.
        live: A live codec, its settings, origin, windows and expectation, saved in a subfolder in the same step.

    Raises:
        OutputError: The folder holds something else or cannot be written.
        CodecError: The codec could not be read back.
    """
    folder = Path(folder)
    check_replaceable(folder)
    files = _files_of(codec, settings, origin, windows, expected)
    if live is not None:
        files |= {f"{LIVE}/{name}": data for name, data in _files_of(*live).items()}
    _write(folder, files)


def copy_codec(source: str | Path, folder: str | Path) -> None:
    """Copy the files of a loaded codec.

    Args:
        source: Folder that the codec was loaded from.
        folder: Where to; conditions and errors are those of `save_codec`.
    """
    check_replaceable(Path(folder))
    names = [name for name in (CARD, TENSORS, f"{LIVE}/{CARD}", f"{LIVE}/{TENSORS}") if Path(source, name).exists()]
    _write(Path(folder), {name: Path(source, name).read_bytes() for name in names})


def _files_of(
    codec: AnyCodec, settings: Record, origin: CodecOrigin, windows: np.ndarray, expected: Expected | None = None
) -> dict[str, bytes]:
    """Return the files of one codec by name. Raises `CodecError` for one that could not be read back."""
    kind = kind_of(codec)
    tensors = {name: x.detach().cpu().contiguous().clone() for name, x in kind.tensors(codec).items()}
    tensors[WINDOWS] = torch.from_numpy(windows.view(np.int64).copy())
    data = save(tensors)
    entries = {"name": codec.name, "settings": settings, "origin": origin, "windows": len(windows)}
    entries |= {"tensors_sha256": hashlib.sha256(data).hexdigest()} | ({} if expected is None else {"expected": expected})
    try:
        card = kind.card(**entries, **kind.entries(codec))
    except ValidationError as error:
        first = error.errors()[0]
        raise CodecError(f"{codec.name}: cannot be saved: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error
    fault = kind.card_fault(card) or _tensor_fault(kind, card, tensors)
    if fault := fault or kind.codec_fault(card, kind.codec_from(card, tensors)):
        raise CodecError(f"{codec.name}: cannot be saved: {fault}")
    content = json.loads(card.model_dump_json())
    content[DIGEST] = _digest(content)
    return {TENSORS: data, CARD: json.dumps(content, indent=1, ensure_ascii=False).encode()}


def _digest(content: dict[str, Any]) -> str:
    """Return the SHA-256 of the other fields of a card."""
    fields = {name: value for name, value in content.items() if name != DIGEST}
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def load_codec(folder: str | Path) -> SavedCodec:
    """Load the codec that `save_codec` wrote.

    Raises:
        CodecError: A file is missing, damaged or of another version; the message names it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        problem = "is a file, not a folder" if folder.exists() else "no such folder"
        raise CodecError(f"{folder}: {problem}: name one that `eigencache fit` or `evaluate --save-codec` wrote")
    if not (folder / CARD).exists() and not (folder / TENSORS).exists():
        raise CodecError(f"{folder}: holds no codec: name a folder that `eigencache fit` or `evaluate --save-codec` wrote")
    if not (folder / CARD).exists():
        raise CodecError(f"{folder / CARD}: is missing: copy the whole folder, or save the codec again")
    try:
        name = CardHead.load(folder / CARD).kind
        if name not in (kinds := saved_kinds()):
            known = ", ".join(sorted(kinds))
            raise RecordError(f"{folder / CARD}: kind {name!r} is unknown to this version, which reads {known}")
        kind = kinds[name]
        card = kind.card.load(folder / CARD)
    except RecordError as error:
        raise CodecError(f"{error}: save the codec again with this version") from error
    if fault := kind.card_fault(card):
        raise CodecError(f"{folder / CARD}: {fault}: save the codec again")
    tensors = _read_tensors(folder / TENSORS, kind, card)
    codec = kind.codec_from(card, tensors)
    if fault := kind.codec_fault(card, codec):
        raise CodecError(f"{folder / CARD}: {fault}: save the codec again")
    content = json.loads((folder / CARD).read_bytes())
    if content.get(DIGEST) not in (None, _digest(content)):  # cards of earlier versions have none
        raise CodecError(f"{folder / CARD}: was changed after it was written: save the codec again")
    return SavedCodec(folder, codec, card, tensors[WINDOWS].numpy().view(np.uint64))  # type: ignore[arg-type]


def load_live(folder: str | Path) -> SavedCodec:
    """Load the live codec that `eigencache fit --live` saved with the stored one. Raises as `load_codec` does."""
    folder = Path(folder)
    if not (folder / LIVE).is_dir():
        if _is_live(folder / CARD):
            return load_codec(folder)
        what = "has no codec for a live cache: fit it again" if (folder / CARD).exists() else "holds no codec: fit one"
        raise CodecError(f"{folder}: {what} with `eigencache fit --live`")
    saved = load_codec(folder / LIVE)
    if saved.card.kind != LIVE:
        raise CodecError(f"{folder / LIVE}: holds a codec of another kind: fit it again with `eigencache fit --live`")
    return saved


def _is_live(card: Path) -> bool:
    return _is_card(card) and json.loads(card.read_bytes()).get("kind") == "live"


def check_replaceable(folder: Path) -> None:
    """Raise `OutputError` for a file, and for a folder that holds anything but a codec."""
    if not folder.exists():
        return
    if folder.resolve() in (Path.cwd(), *Path.cwd().parents):
        raise OutputError(f"{folder}: would replace the current directory: name a new folder in it")
    if not folder.is_dir():
        raise OutputError(f"{folder}: is a file: name a folder")
    try:
        names = {entry.name for entry in folder.iterdir()} - _OF_FILE_MANAGERS
    except OSError as error:
        raise OutputError(f"{folder}: cannot be read ({error.strerror}): name another folder") from error
    if LIVE in names:
        check_replaceable(folder / LIVE)
    if names and (names - {LIVE} != {CARD, TENSORS} or not _is_card(folder / CARD)):
        raise OutputError(f"{folder}: holds other files than a codec and was not changed: name another folder")


def _is_card(path: Path) -> bool:
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and str(content.get("schema_version")).startswith("eigencache.codec/")


def _tensor_fault(kind: SavedKind, card: CodecCard, tensors: Tensors) -> Fault:
    expected = {WINDOWS: (torch.int64, (card.windows,))} | kind.tensor_kinds(card)
    return tensor_fault(expected, tensors) or kind.value_fault(card, tensors)


def _read_tensors(path: Path, kind: SavedKind, card: CodecCard) -> dict[str, Tensor]:
    """Read the tensors, each into a storage of its own, so that none is unaligned."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CodecError(f"{path}: cannot be read ({error.strerror}): save the codec again") from error
    found = hashlib.sha256(data).hexdigest()
    if found != card.tensors_sha256:
        raise CodecError(
            f"{path}: does not match {CARD} (sha256 {found[:12]}, expected {card.tensors_sha256[:12]}): save the codec again"
        )
    try:
        tensors = {name: x.clone() for name, x in load(data).items()}
    except (SafetensorError, KeyError, ValueError, RuntimeError) as error:  # depends on the defect of the header
        raise CodecError(f"{path}: not a safetensors file ({error}): save the codec again") from error
    if fault := _tensor_fault(kind, card, tensors):
        raise CodecError(f"{path}: {fault}: save the codec again")
    return tensors


def _write(folder: Path, files: dict[str, bytes]) -> None:
    """Write files into a new folder, which replaces the old one only when it is complete."""
    try:
        place = folder.resolve()  # the target of a link
        place.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=place.parent, prefix=f".{place.name}.") as temporary:
            new, old = Path(temporary, "new"), Path(temporary, "old")
            new.mkdir()
            for name, data in files.items():
                (new / name).parent.mkdir(exist_ok=True)
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
