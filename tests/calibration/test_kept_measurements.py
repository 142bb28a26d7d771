"""What a calibration set has kept is what it measured; what belongs to another set is not used."""

from pathlib import Path

import pytest
import torch

from eigencache.calibration.calibration_set import CalibrationSet
from eigencache.calibration.kept_measurements import KeptMeasurements
from eigencache.calibration.session import Session
from eigencache.errors import OutputError
from stub_codecs import random_sequences, tiny_loaded

TEXT = random_sequences(*[40] * 32)
KEY = {"text": "one"}


def calibration(folder: Path | None, key: dict[str, str] = KEY, name: str = "llama") -> tuple[CalibrationSet, list[str]]:
    """A calibration set that keeps its measurements in a folder, and the names of the work that it reports."""
    reported: list[str] = []
    session = Session(tiny_loaded(name), on_progress=lambda what, _done, _of: reported.append(what))
    return CalibrationSet(session, TEXT, kept=KeptMeasurements(folder, key)), reported


@pytest.mark.parametrize("name", ["gpt2", "llama", "deepseek_v3", "gemma2"])
@pytest.mark.parametrize("metric", ["fisher", "attention"])
def test_what_was_kept_equals_what_was_measured(tmp_path: Path, name: str, metric: str) -> None:
    measured, _ = calibration(tmp_path / "partial", name=name)
    resumed, reported = calibration(tmp_path / "partial", name=name)
    for one, other in zip(measured.metric(metric), resumed.metric(metric), strict=True):
        assert one.dtype == other.dtype and torch.equal(one, other)
    for one, other in ((measured.samples, resumed.samples), (measured.held_out_samples, resumed.held_out_samples)):
        assert torch.equal(one.vectors(), other.vectors()) and torch.equal(one.ids, other.ids)
        assert (one.lengths, one.layout.parts) == (other.lengths, other.layout.parts)
        assert one.layout.rotations.keys() == other.layout.rotations.keys()
    assert measured.sinks == resumed.sinks
    for place in measured.gradients["fisher"].first:
        assert measured.gradients["fisher"].share(place) == pytest.approx(
            resumed.gradients["fisher"].share(place), rel=1e-12
        )
    assert reported and all(what.endswith("kept by an interrupted fit") for what in reported)


def test_measurements_of_another_key_are_not_used(tmp_path: Path) -> None:
    calibration(tmp_path)[0].metric("fisher")
    other, reported = calibration(tmp_path, {"text": "another"})
    other.metric("fisher")
    assert "fisher metric" in reported and not any("kept" in what for what in reported)


def test_vectors_of_other_tokens_are_not_used(tmp_path: Path) -> None:
    _ = calibration(tmp_path)[0].samples
    fewer, reported = calibration(tmp_path)
    fewer.most_vectors = 320
    assert len(fewer.samples) == 280 and "vectors" in reported


def test_a_damaged_file_is_measured_anew(tmp_path: Path) -> None:
    measured = calibration(tmp_path)[0].samples
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:200])
    again, reported = calibration(tmp_path)
    assert torch.equal(again.samples.vectors(), measured.vectors()) and "vectors" in reported


def test_a_folder_that_cannot_be_made_is_named_and_nothing_is_left(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OutputError, match=r"vectors\.safetensors: cannot be written"):
        _ = calibration(tmp_path / "file")[0].samples
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_nothing_is_kept_without_a_folder() -> None:
    kept = KeptMeasurements()
    kept.keep("vectors", {"x": torch.ones(1)})
    assert kept.find("vectors") is None


def test_a_folder_loses_nothing_that_was_not_kept_in_it(tmp_path: Path) -> None:
    for name in ("vectors.safetensors", "fisher-metric.unfinished", "notes.txt"):
        (tmp_path / name).touch()
    KeptMeasurements(tmp_path).clear()
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
