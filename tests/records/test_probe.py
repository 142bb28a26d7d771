"""Records come back from JSON equal; a damaged file is refused, and a file is written whole or not at all, by name."""

from __future__ import annotations

import errno
import io
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eigencache.errors import OutputError, RecordError
from eigencache.geometry import KVGeometry, Layer
from eigencache.records.base import write_whole
from eigencache.records.probe import ProbeRecord, Spectrum
from eigencache.records.run import Corpus, Model, Run
from eigencache.spectral.measure import Place, measure
from eigencache.spectral.moments import Moments


def spectrum(layer_idx: int | None = 0, head: int | None = None, frame: str = "pre_rope", centered: bool = True) -> Spectrum:
    """A measured spectrum whose condition number is infinite: one dimension never varies."""
    moments = Moments(3, folds=8)
    for fold in range(8):
        vectors = torch.randn(100, 1, 3, generator=torch.Generator().manual_seed(fold), dtype=torch.float64)
        vectors[..., 1] = 0
        moments.update(vectors, fold=fold)
    scope = "all" if layer_idx is None else "layer" if head is None else "head"
    return measure(Place(layer_idx, head, "keys", frame, scope), moments, centered=centered, distinct_contexts=700)


def record(*spectra: Spectrum, **changes: Any) -> ProbeRecord:
    """A small record with the given spectra."""
    layers = tuple(
        Layer(layer_idx=i, attention="full", num_attention_heads=2, num_key_value_heads=2, head_dim=3, v_head_dim=3)
        for i in range(2)
    )
    geometry = KVGeometry(
        model_type="llama",
        attention="MHA",
        hidden_size=6,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=3,
        layers=layers,
    )
    model = {"name": "tiny", "architecture": "Llama", "dtype": "float32", "device": "cpu", "parameters": 9, "sha256": "ab"}
    corpus = {"tokens": 800, "sequences": 8, "max_length": 100, "distinct_token_ids": 20, "distinct_8grams": 700}
    versions = {"eigencache": "0", "python": "3", "torch": "2", "transformers": "5", "numpy": "2", "machine": "cpu"}
    costs = {"started": "2025-01-01T00:00:00Z", "wall_s": 1.5, "forward_s": 0.5, "peak_memory_mb": 10.0}
    fields = {
        "model": Model(**model, adapter="separate projections", geometry=geometry),
        "corpus": Corpus(name="text – ünïcode", sha256="cd", repetition=0.1, **corpus),
        "run": Run(**versions, **costs, seed=0, settings={"scopes": "head", "layers": None, "batch": 8, "fast": True}),
        "spectra": list(spectra),
    }
    return ProbeRecord(**fields | changes)


def changed(path: Path, change: Callable[[dict], None]) -> None:
    """Rewrite a saved record as a program that knows nothing of the schema would."""
    content = json.loads(path.read_text(encoding="utf-8"))
    change(content)
    path.write_text(json.dumps(content), encoding="utf-8")


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "probe.json"
    record(spectrum()).save(path)
    return path


@pytest.mark.parametrize("as_type", [str, Path])
def test_what_is_saved_is_loaded_equal_with_its_infinities(tmp_path: Path, as_type: type) -> None:
    path = as_type(tmp_path / "a" / "new" / "folder" / "probe.json")
    original = record(spectrum(), spectrum(None, centered=False))
    original.save(path)
    loaded = ProbeRecord.load(path)
    assert loaded == original
    for found in loaded.spectra:
        assert math.isinf(found.condition_number)
        assert found.dead == [1]
        assert all(isinstance(k, int) for k in found.energy)
    assert json.loads(Path(path).read_text(encoding="utf-8"))["schema_version"] == "eigencache.probe/1"


def test_a_record_from_before_dead_dimensions_were_counted_is_read(saved: Path) -> None:
    def before(content: dict) -> None:
        for one in content["spectra"]:
            del one["dead"]
            one["spread"] = "Infinity"

    changed(saved, before)
    (found,) = ProbeRecord.load(saved).spectra
    assert (found.dead, found.spread) == ([], math.inf)


@settings(derandomize=True, deadline=None, max_examples=50)
@given(st.lists(st.floats(allow_nan=False), max_size=5), st.floats(allow_nan=False), st.text())
def test_every_number_and_text_survives_json(values: list[float], number: float, text: str) -> None:
    interval = {"effective_rank": (-number, number)}
    one = spectrum().model_copy(update={"eigenvalues": values, "spread": number, "intervals": interval, "warnings": [text]})
    original = record(one)
    assert ProbeRecord.model_validate_json(original.model_dump_json()) == original


def test_saving_over_a_file_replaces_it(saved: Path) -> None:
    record().save(saved)
    assert ProbeRecord.load(saved) == record()
    assert [entry.name for entry in saved.parent.iterdir()] == [saved.name]


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing": (lambda path: path.unlink(), "No such file"),
    "a folder": (lambda path: (path.unlink(), path.mkdir()), "directory"),
    "empty": (lambda path: path.write_bytes(b""), "the file: Invalid JSON"),
    "cut short": (lambda path: path.write_bytes(path.read_bytes()[:-100]), "the file: Invalid JSON"),
    "no text": (lambda path: path.write_bytes(b"\xff\xfe\x00" * 99), "the file: Invalid JSON"),
    "not a record": (lambda path: path.write_text("[1, 2]"), "the file: "),
    "another schema": (
        lambda path: changed(path, lambda content: content.update(schema_version="eigencache.probe/2")),
        "schema_version: Input should be 'eigencache.probe/1'",
    ),
    "unknown field": (lambda path: changed(path, lambda content: content.update(extra=1)), "extra: Extra inputs"),
    "unknown field inside": (
        lambda path: changed(path, lambda content: content["spectra"][0].update(rank_50=1)),
        "spectra.0.rank_50: Extra inputs",
    ),
    "lost field": (lambda path: changed(path, lambda content: content["spectra"][0].pop("frame")), "spectra.0.frame: Field"),
    "wrong type": (
        lambda path: changed(path, lambda content: content["corpus"].update(tokens="many")),
        "corpus.tokens: Input",
    ),
    "wrong scope": (
        lambda path: changed(path, lambda content: content["spectra"][0].update(scope="row")),
        "spectra.0.scope:",
    ),
}


@pytest.mark.parametrize(("damage", "said"), DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_file_is_refused_naming_the_file_and_what_is_wrong(
    saved: Path, damage: Callable[[Path], Any], said: str
) -> None:
    damage(saved)
    with pytest.raises(RecordError) as error:
        ProbeRecord.load(saved)
    assert str(error.value).startswith(f"{saved}: ")
    assert said in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("target", ["file/below", "folder"], ids=["below a file", "over a folder"])
def test_a_path_that_cannot_be_written_is_named_and_nothing_is_left_behind(tmp_path: Path, target: str) -> None:
    (tmp_path / "file").write_text("kept")
    (tmp_path / "folder").mkdir()
    with pytest.raises(OutputError) as error:
        record().save(tmp_path / target)
    assert str(error.value).startswith(f"{tmp_path / target}: cannot be written (")
    assert sorted(entry.name for entry in tmp_path.rglob("*")) == ["file", "folder"]
    assert (tmp_path / "file").read_text() == "kept"


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is forbidden to root")
def test_a_folder_without_permission_is_named(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(OutputError, match=str(tmp_path / "probe.json")):
        record().save(tmp_path / "probe.json")


@pytest.mark.parametrize("existing", [None, b"what was there before"], ids=["new", "over an older file"])
@pytest.mark.parametrize(
    ("interruption", "expected"),
    [(OSError(errno.ENOSPC, "No space left on device"), OutputError), (KeyboardInterrupt(), KeyboardInterrupt)],
    ids=["disk full", "interrupted"],
)
@pytest.mark.parametrize("moment", ["write", "replace"])
def test_an_interrupted_write_leaves_no_part_of_a_file(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    moment: str,
    interruption: BaseException,
    expected: type[BaseException],
    existing: bytes | None,
) -> None:
    path = tmp_path / "probe.json"
    if existing:
        path.write_bytes(existing)

    class Half(io.FileIO):
        def write(self, data: bytes) -> int:
            super().write(data[: len(data) // 2])
            raise interruption

    def replace(*_: Path) -> None:
        raise interruption

    monkeypatch.setattr(*((os, "fdopen", Half) if moment == "write" else (Path, "replace", replace)))
    with pytest.raises(expected) as error:
        write_whole(path, b"new" * 1000)
    if expected is OutputError:
        assert str(error.value).startswith(f"{path}: cannot be written (No space left on device)")
    assert {entry.name: entry.read_bytes() for entry in tmp_path.iterdir()} == ({path.name: existing} if existing else {})


def test_a_written_file_can_be_read_by_others(tmp_path: Path) -> None:
    write_whole(tmp_path / "out", b"data")
    assert (tmp_path / "out").read_bytes() == b"data"
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [
        ({}, [0, 1, 2, 3]),
        ({"centered": None}, [0, 1, 2, 3, 4]),
        ({"centered": False}, [4]),
        ({"name": "keys_pre_rope"}, [0, 1, 2]),
        ({"scope": "head"}, [0, 1]),
        ({"layer_idx": 1}, [1]),
        ({"layer_idx": 0, "head": 0}, [0]),
        ({"name": "values"}, []),
    ],
    ids=str,
)
def test_spectra_are_selected_by_what_they_are_of(chosen: dict[str, Any], expected: list[int]) -> None:
    spectra = [
        spectrum(0, 0),
        spectrum(1, 0),
        spectrum(None),
        spectrum(0, frame="post_rope"),
        spectrum(0, frame="post_rope", centered=False),
    ]
    of = record(*spectra)
    assert of.select(**chosen) == [spectra[i] for i in expected]
    assert of.names == ["keys_pre_rope", "keys_post_rope"]
