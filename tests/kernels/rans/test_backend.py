"""A backend given by name is used or refused; without a name, Triton decodes on a GPU."""

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

import pytest
import torch

from eigencache.errors import CodecError
from eigencache.kernels.rans import backend
from eigencache.kernels.rans.backend import choose_backend, unavailable

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture(params=[True, False], ids=["installed", "missing"])
def triton(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Pretend that Triton is installed, or that it is not."""
    module = ModuleType("triton")
    module.__spec__ = ModuleSpec("triton", None)
    monkeypatch.setitem(sys.modules, "triton", module if request.param else None)  # type: ignore[arg-type]
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    return request.param


def test_without_a_name_it_is_triton_on_a_gpu_that_has_it(triton: bool, caplog: pytest.LogCaptureFixture) -> None:
    backend._warn_once.cache_clear()
    for _ in range(2):
        assert choose_backend(None, GPU) == ("triton" if triton else "cpu")
    assert ["pip install" in record.getMessage() for record in caplog.records] == [True] * (not triton)
    assert unavailable(GPU).keys() == ({"triton"} if not triton else set())
    assert choose_backend(None, CPU) == "cpu"


def test_a_name_is_used_or_refused(triton: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_backend("cpu", GPU) == choose_backend("cpu", CPU) == "cpu"
    if not triton:
        with pytest.raises(CodecError, match=r"pip install 'eigencache\[triton\]'"):
            choose_backend("triton", GPU)
        return
    assert choose_backend("triton", GPU) == "triton"
    with pytest.raises(CodecError, match="the codec is on cpu"):
        choose_backend("triton", CPU)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert choose_backend("triton", CPU) == "triton"


def test_another_name_is_refused() -> None:
    with pytest.raises(CodecError, match="`backend` 'cuda' does not exist: use one of cpu, triton"):
        choose_backend("cuda", GPU)  # type: ignore[arg-type]
