"""A fitted codec as a folder of two files: its tensors in `codec.safetensors`, what they are in `card.json`.

What is read back encodes bit for bit like what was written and holds as many bytes. A damaged folder is refused by the
name of the file at fault, before anything is decoded.
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

from eigencache.codec.eigen.codec import EigenCodec
from eigencache.codec.live.codec import LiveCodec
from eigencache.codec.pca import PCACodec
from eigencache.codec.saved import eigen as saved_eigen
from eigencache.codec.saved import live as saved_live
from eigencache.codec.saved import pca as saved_pca
from eigencache.codec.saved.card import (
    CardHead,
    CodecCard,
    CodecOrigin,
    EigenCard,
    EigenCardSettings,
    Expected,
    LiveCard,
    LiveCardSettings,
    PCACard,
    PCACardSettings,
)
from eigencache.codec.saved.kind import Fault, Kind, Tensors, tensor_fault
from eigencache.errors import CodecError, OutputError, RecordError

CARD, TENSORS, LIVE = "card.json", "codec.safetensors", "live"  # the last is a folder like this one
DIGEST = "card_sha256"
_OF_FILE_MANAGERS = {".DS_Store", "Thumbs.db", "desktop.ini"}
KINDS: dict[str, Kind] = {"pca": saved_pca.KIND, "eigen": saved_eigen.KIND, "live": saved_live.KIND}  # by what a card says
WINDOWS = "calibration.windows"
AnyCodec = PCACodec | EigenCodec | LiveCodec
Settings = PCACardSettings | EigenCardSettings | LiveCardSettings
Card = PCACard | EigenCard | LiveCard


@dataclass(frozen=True, eq=False)
class SavedCodec:
    """A codec that was read from `folder`; `windows`: hashes of its calibration text, ascending, uint64."""

    folder: Path
    codec: AnyCodec
    card: Card
    windows: np.ndarray

    @property
    def coded_bits(self) -> float | None:
        """What a coded token is expected to cost; None for a codec whose bytes follow from the number of tokens."""
        return self.card.expected.coded_bits if isinstance(self.card, EigenCard) else None


def save_codec(
    folder: str | Path,
    codec: AnyCodec,
    settings: Settings,
    origin: CodecOrigin,
    windows: np.ndarray,
    expected: Expected | None = None,
    *,
    live: tuple[Any, ...] | None = None,
) -> None:
    """Write all files or none; a codec that lies there is replaced, anything else is never touched.

    `windows`: sketch of the calibration text (`corpora.overlap.sketch`), uint64. `expected`: of an `EigenCodec`. `live`: a
    live codec, its settings, origin, windows and expectation, written beside it in the same step. Raises `OutputError` for a
    folder that holds other things or cannot be written, `CodecError` for a codec that could not be read back.
    """
    folder = Path(folder)
    check_replaceable(folder)
    files = _files_of(codec, settings, origin, windows, expected)
    if live is not None:
        files |= {f"{LIVE}/{name}": data for name, data in _files_of(*live).items()}
    _write(folder, files)


def copy_codec(source: str | Path, folder: str | Path) -> None:
    """Write what a folder holds, whose codec has been loaded, into another one. Raises as `save_codec` does."""
    check_replaceable(Path(folder))
    names = [name for name in (CARD, TENSORS, f"{LIVE}/{CARD}", f"{LIVE}/{TENSORS}") if Path(source, name).exists()]
    _write(Path(folder), {name: Path(source, name).read_bytes() for name in names})


def _files_of(
    codec: AnyCodec, settings: Settings, origin: CodecOrigin, windows: np.ndarray, expected: Expected | None = None
) -> dict[str, bytes]:
    """The files of one codec by name. Raises `CodecError` for one that could not be read back."""
    kind = next(kind for kind in KINDS.values() if isinstance(codec, kind.codec))
    tensors = {name: x.detach().cpu().contiguous().clone() for name, x in kind.tensors_of(codec).items()}
    tensors[WINDOWS] = torch.from_numpy(windows.view(np.int64).copy())
    data = save(tensors)
    said = {"name": codec.name, "settings": settings, "origin": origin, "windows": len(windows)}
    said |= {"tensors_sha256": hashlib.sha256(data).hexdigest()} | ({} if expected is None else {"expected": expected})
    try:
        card = kind.card(**said, **kind.entries_of(codec))
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
    """SHA-256 of what a card says beside it."""
    said = {name: value for name, value in content.items() if name != DIGEST}
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def load_codec(folder: str | Path) -> SavedCodec:
    """What `save_codec` wrote. Raises `CodecError` naming the file that is missing, damaged or of another version."""
    folder = Path(folder)
    if not folder.is_dir():
        raise CodecError(f"{folder}: no such folder: name one that `eigencache fit` or `evaluate --save-codec` wrote")
    if not (folder / CARD).exists() and not (folder / TENSORS).exists():
        raise CodecError(f"{folder}: holds no codec: name a folder that `eigencache fit` or `evaluate --save-codec` wrote")
    try:
        kind = KINDS[CardHead.load(folder / CARD).kind]
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
    """The codec of the live cache that `eigencache fit --live` put beside the stored one. Raises as `load_codec` does."""
    folder = Path(folder)
    if not (folder / LIVE).is_dir():
        if _is_live(folder / CARD):
            return load_codec(folder)
        what = "has no codec for a live cache: fit it again" if (folder / CARD).exists() else "holds no codec: fit one"
        raise CodecError(f"{folder}: {what} with `eigencache fit --live`")
    saved = load_codec(folder / LIVE)
    if not isinstance(saved.codec, LiveCodec):
        raise CodecError(f"{folder / LIVE}: holds a codec of another kind: fit it again with `eigencache fit --live`")
    return saved


def _is_live(card: Path) -> bool:
    return _is_card(card) and json.loads(card.read_bytes()).get("kind") == "live"


def check_replaceable(folder: Path) -> None:
    """Raises `OutputError` for a file, and for a folder that holds anything but a codec."""
    if not folder.exists():
        return
    if folder.resolve() in (Path.cwd(), *Path.cwd().parents):
        raise OutputError(f"{folder}: the shell is in this folder, which a codec would replace: name a new folder in it")
    if not folder.is_dir():
        raise OutputError(f"{folder}: is a file: name a folder")
    try:
        names = {entry.name for entry in folder.iterdir()} - _OF_FILE_MANAGERS
    except OSError as error:
        raise OutputError(f"{folder}: cannot be read ({error.strerror}): name another folder") from error
    if LIVE in names:
        check_replaceable(folder / LIVE)
    if names and (names - {LIVE} != {CARD, TENSORS} or not _is_card(folder / CARD)):
        raise OutputError(f"{folder}: holds other things than a codec and is left alone: name another folder")


def _is_card(path: Path) -> bool:
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and str(content.get("schema_version")).startswith("eigencache.codec/")


def _tensor_fault(kind: Kind, card: CodecCard, tensors: Tensors) -> Fault:
    expected = {WINDOWS: (torch.int64, (card.windows,))} | kind.tensor_kinds(card)
    return tensor_fault(expected, tensors) or kind.value_fault(card, tensors)


def _read_tensors(path: Path, kind: Kind, card: CodecCard) -> dict[str, Tensor]:
    """Every tensor in a storage of its own, so that none lies unaligned."""
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
        tensors = {name: x.clone() for name, x in load(data).items()}
    except (SafetensorError, KeyError, ValueError, RuntimeError) as error:  # by what is wrong with the header
        raise CodecError(f"{path}: no file of tensors ({error}): save the codec again") from error
    if fault := _tensor_fault(kind, card, tensors):
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
