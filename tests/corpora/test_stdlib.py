import sysconfig

import pytest

from eigencache.corpora import stdlib
from eigencache.corpora.resolve import read_text
from eigencache.corpora.stdlib import SPLITS, module_paths, split_of
from eigencache.errors import CorpusError


@pytest.fixture(scope="module")
def texts():
    return {split: read_text(spec) for split, spec in zip(SPLITS, ("stdlib", "stdlib:held-out"), strict=True)}


@pytest.fixture(scope="module")
def titles(texts):
    return {split: [document.title for document in text.documents] for split, text in texts.items()}


def test_a_held_out_module_is_never_a_calibration_module(titles):
    calibration, held_out = map(set, titles.values())
    assert calibration and held_out and not calibration & held_out
    assert 0.05 < len(held_out) / len(calibration | held_out) < 0.2


def test_no_document_is_in_both_splits(texts):
    calibration, held_out = ({document.text for document in text.documents} for text in texts.values())
    assert all(len(shared) < 100 for shared in calibration & held_out)  # packages may share a license comment


@pytest.mark.parametrize("split", SPLITS)
def test_a_document_is_a_module_of_the_split(texts, titles, split):
    assert texts[split].name == f"stdlib:{split}"
    assert {split_of(title) for title in titles[split]} == {split}
    assert sysconfig.get_path("stdlib") not in " ".join(titles[split])


def test_stdlib_is_its_calibration_split(texts):
    assert texts["calibration"].name == "stdlib:calibration"


def test_the_split_goes_by_the_path_alone():
    frozen = {
        "json/decoder.py": "calibration",
        "tempfile.py": "calibration",
        "copy.py": "held-out",
        "zoneinfo/__init__.py": "held-out",
    }
    assert {name: split_of(name) for name in frozen} == frozen


@pytest.mark.parametrize("spec", ["stdlib:test", "stdlib:held-out:2"])
def test_another_split_is_refused_with_those_there_are(spec):
    split = spec.partition(":")[2]
    with pytest.raises(CorpusError, match=f"no split '{split}': use stdlib:calibration or stdlib:held-out"):
        read_text(spec)


def test_tests_and_other_files_are_left_out(tmp_path):
    for name in ("a.py", "b/c.py", "d.py", "test/e.py", "b/tests/f.py", "g.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).touch()
    assert {name for name, _ in module_paths("calibration", tmp_path)} == {"a.py", "b/c.py", "d.py"}


def test_a_python_without_modules_on_disk_is_refused_with_the_folder(tmp_path):
    with pytest.raises(CorpusError, match=rf"{tmp_path}: contains no module of the standard library"):
        module_paths("calibration", tmp_path)


def test_a_module_that_cannot_be_read_is_refused_by_name(monkeypatch, tmp_path):
    monkeypatch.setattr(stdlib, "module_paths", lambda split: [("gone.py", tmp_path / "gone.py")])
    with pytest.raises(CorpusError, match=r"gone\.py: cannot be read \(No such file or directory\): pass a file as `text`"):
        read_text("stdlib:held-out")
