"""What was finished before an interruption is taken up, and nothing else is."""

from pathlib import Path

import pytest

from eigencache.errors import OutputError
from eigencache.evaluate.resume import ResumableResults


def test_results_survive_and_other_settings_begin_anew(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "out.json.partial"
    first = ResumableResults(path, {"a": 1})
    first.add({"x": 1.5})
    first.add({"x": 2.5})
    assert ResumableResults(path, {"a": 1}).done == [{"x": 1.5}, {"x": 2.5}]
    other = ResumableResults(path, {"a": 2})
    assert other.done == []
    other.add({"x": 9})
    assert ResumableResults(path, {"a": 2}).done == [{"x": 9}]
    assert ResumableResults(path, {"a": 1}).done == []


def test_a_torn_last_line_is_dropped_and_written_again(tmp_path: Path) -> None:
    path = tmp_path / "p"
    ResumableResults(path, {}).add({"x": 1})
    with path.open("a") as file:
        file.write('{"x": 2')
    again = ResumableResults(path, {})
    assert again.done == [{"x": 1}]
    again.add({"x": 3})
    assert ResumableResults(path, {}).done == [{"x": 1}, {"x": 3}]


def test_without_a_path_nothing_is_written_and_a_finished_file_is_gone(tmp_path: Path) -> None:
    nowhere = ResumableResults(None, {})
    nowhere.add(1)
    assert nowhere.done == [1]
    path = tmp_path / "p"
    partial = ResumableResults(path, {})
    partial.add(1)
    partial.finish()
    assert not path.exists()


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="file/p: cannot be written"):
        ResumableResults(tmp_path / "file" / "p", {}).add(1)
