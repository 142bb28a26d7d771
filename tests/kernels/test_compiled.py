"""A library is built once, rebuilt when it is damaged, and never loaded if other users can write it."""

import ctypes
import logging
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from eigencache.errors import CodecError
from eigencache.kernels import compiled
from eigencache.kernels.compiled import CompilationError
from eigencache.kernels.packed import backend as packed
from eigencache.kernels.packed import vnni
from eigencache.kernels.packed.backend import packed_backend

FLAGS, LIBRARIES = ("-O1", "-shared", "-fPIC"), ("-lm",)


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("CC", raising=False)
    source, header = tmp_path / "answer.c", tmp_path / "answer.h"
    source.write_text('#include "answer.h"\nint answer(void) { return ANSWER; }\n')
    header.write_text("#define ANSWER 42\n")
    return source, header


def load(sources: tuple[Path, Path], flags: tuple[str, ...] = FLAGS) -> int:
    return int(compiled.load(sources, flags, LIBRARIES)["answer"]())


def libraries(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "cache" / "eigencache").glob("*.so"))


@pytest.fixture
def built(sources: tuple[Path, Path], tmp_path: Path) -> Path:
    assert load(sources) == 42
    (library,) = libraries(tmp_path)
    return library


def test_it_is_built_once_and_needs_no_compiler_afterwards(built, sources, monkeypatch) -> None:
    written = built.stat().st_mtime_ns
    assert load(sources) == 42 and built.stat().st_mtime_ns == written
    monkeypatch.setenv("PATH", str(built.parent))
    assert load(sources) == 42
    assert built.name.startswith("answer-") and built.stem.rsplit("-", 1)[1] in ("cc", "gcc", "clang")


@pytest.mark.parametrize("change", ["header", "flags", "compiler"])
def test_another_source_flag_or_compiler_is_another_library(change, built, sources, tmp_path, monkeypatch) -> None:
    if change == "header":
        sources[1].write_text("#define ANSWER 43\n")
    if change == "compiler":
        monkeypatch.setenv("CC", "gcc -pthread")  # options of its own are options, not a part of the name
    assert load(sources, (*FLAGS, "-g") if change == "flags" else FLAGS) == (43 if change == "header" else 42)
    assert len(libraries(tmp_path)) == 2


@pytest.mark.parametrize("damage", [b"", b"not a library", "half", "no note"])
def test_a_damaged_library_is_built_again(damage, built, sources) -> None:
    whole = built.read_bytes()
    if damage == "no note":
        built.with_suffix(".sha256").unlink()
    else:
        built.unlink()  # it may be in use by this very process
        built.write_bytes(whole[: len(whole) // 2] if damage == "half" else damage)
        built.chmod(0o700)
    assert load(sources) == 42
    assert compiled._intact(built)


def test_a_damaged_library_without_a_compiler_is_never_loaded(built, sources, monkeypatch) -> None:
    whole = built.read_bytes()
    built.unlink()
    built.write_bytes(whole[:-1] + b"\0" if whole[-1] else whole[:-1] + b"\1")
    monkeypatch.setenv("PATH", str(built.parent))
    with pytest.raises(CompilationError, match="is damaged, and there is no C compiler"):
        load(sources)


def test_planted_code_does_not_run(sources, tmp_path) -> None:
    folder = tmp_path / "cache" / "eigencache"
    folder.mkdir(parents=True)
    folder.chmod(0o777)
    with pytest.raises(CompilationError, match=r"eigencache can be written by other users: run chmod go-w on it"):
        load(sources)
    folder.chmod(0o700)
    assert load(sources) == 42
    (library,) = libraries(tmp_path)
    library.chmod(0o722)
    with pytest.raises(CompilationError, match=r"\.so can be written by other users"):
        load(sources)


def test_a_folder_of_another_user_is_refused(built, sources, monkeypatch) -> None:
    monkeypatch.setattr(os, "getuid", lambda: built.stat().st_uid + 1)
    with pytest.raises(CompilationError, match="belongs to another user"):
        load(sources)


def test_what_the_compiler_says_is_shown(sources, monkeypatch) -> None:
    sources[1].write_text("#define ANSWER undeclared_name\n")
    with pytest.raises(CompilationError, match="undeclared_name"):
        load(sources)
    monkeypatch.setenv("CC", "/bin/false")
    with pytest.raises(CompilationError, match="/bin/false: exit code 1, and no library was written"):
        load(sources)
    monkeypatch.setenv("CC", "/no/such/compiler")
    with pytest.raises(CompilationError, match="No such file or directory: '/no/such/compiler'"):
        load(sources)


def test_without_compiler_home_or_a_folder_the_reason_is_given(sources, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(CompilationError, match="no C compiler: install gcc"):
        load(sources)
    monkeypatch.undo()
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(CompilationError, match="Not a directory"):
        load(sources)
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    with pytest.raises(CompilationError, match="no home folder: set the environment variable XDG_CACHE_HOME"):
        load(sources)


def test_an_undefined_symbol_is_found_when_the_library_is_loaded(sources) -> None:
    sources[0].write_text("int missing(void);\nint answer(void) { return missing(); }\n")
    with pytest.raises(CompilationError, match="missing"):
        load(sources)


# The backend that needs it


@pytest.fixture
def fresh() -> Iterator[None]:
    """Forget, before and after the test, which kernels can be used."""
    caches = vnni.unavailable, vnni._library
    for one in caches:
        one.cache_clear()
    yield
    for one in caches:
        one.cache_clear()


def test_the_portable_code_is_used_after_one_warning_that_gives_the_reason(fresh, monkeypatch, caplog) -> None:
    monkeypatch.setattr(vnni, "_FEATURES", ())
    monkeypatch.setenv("CC", "/bin/false")
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/none")
    with caplog.at_level(logging.WARNING):
        assert [packed_backend(torch.ones(1), 1).name for _ in range(3)] == ["cpu"] * 3
    (record,) = caplog.records
    assert "slower backends read" in record.getMessage() and "/proc/none" in record.getMessage()
    assert "/proc/none" in packed.unavailable(torch.device("cpu"))["vnni"]
    with pytest.raises(CodecError, match=r"`backend` 'vnni' cannot be used: the library cannot be built: .*/proc/none"):
        packed_backend(torch.ones(1), 1, "vnni")


def test_a_cpu_without_the_instructions_is_no_fault_but_refuses_the_name(fresh, monkeypatch, caplog) -> None:
    monkeypatch.setattr(vnni, "_FEATURES", ("avx512vnni", "of the future"))
    assert packed_backend(torch.ones(1), 1).name == "cpu" and not caplog.records
    with pytest.raises(CodecError, match=r"`backend` 'vnni' cannot be used: this CPU lacks .*of the future"):
        packed_backend(torch.ones(1), 1, "vnni")


def test_a_backend_asked_for_by_name_is_used_or_refused() -> None:
    x = torch.ones(1)
    assert [packed_backend(x, 10**6, name).name for name in ("reference", "cpu")] == ["reference", "cpu"]
    with pytest.raises(CodecError, match="`backend` 'fast' does not exist: use one of reference, cpu, vnni, triton"):
        packed_backend(x, 1, "fast")  # type: ignore[arg-type]
    with pytest.raises(CodecError, match="`backend` 'triton' cannot be used: it needs a cuda device, the model is on cpu"):
        packed_backend(x, 1, "triton")
    with pytest.raises(CodecError, match="`backend` 'cpu' cannot be used: it needs a cpu device, the model is on meta"):
        packed_backend(x.to("meta"), 1, "cpu")
    trained = torch.ones(1, requires_grad=True)
    assert packed_backend(trained, 1, "reference") is packed.REFERENCE
    with pytest.raises(CodecError, match="`backend` 'cpu' computes no gradients: use 'reference', or run"):
        packed_backend(trained, 1, "cpu")


def test_addresses_keep_what_they_are_of_alive() -> None:
    widths = (packed.Widths(8, 16, 8),)
    codes = vnni._codes_of(torch.zeros(1, 2, widths[0].nbytes, dtype=torch.uint8), widths)
    blocks, bundles = codes.owners
    assert (codes.data, codes.bundles) == (blocks.data_ptr(), bundles.data_ptr())
    assert isinstance(codes, ctypes.Structure)


def test_only_the_owner_can_write_what_is_built(built) -> None:
    for path in (built.parent, built, built.with_suffix(".sha256")):
        assert not path.stat().st_mode & (stat.S_IWGRP | stat.S_IWOTH)
