"""A backend that was asked for by name is used or refused; without a name, Triton where the tensors are on a GPU."""

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

import pytest
import torch

from eigencache.errors import CodecError
from eigencache.kernels.rans.backend import chosen

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture(params=[True, False], ids=["installed", "missing"])
def triton(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether Triton seems to be installed."""
    module = ModuleType("triton")
    module.__spec__ = ModuleSpec("triton", None)
    monkeypatch.setitem(sys.modules, "triton", module if request.param else None)  # type: ignore[arg-type]
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    return request.param


def test_without_a_name_it_is_triton_on_a_gpu_that_has_it(triton: bool) -> None:
    assert chosen(None, GPU) == ("triton" if triton else "cpu")
    assert chosen(None, CPU) == "cpu"


def test_a_name_is_used_or_refused(triton: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    assert chosen("cpu", GPU) == chosen("cpu", CPU) == "cpu"
    if not triton:
        with pytest.raises(CodecError, match=r"pip install 'eigencache\[triton\]'"):
            chosen("triton", GPU)
        return
    assert chosen("triton", GPU) == "triton"
    with pytest.raises(CodecError, match="the codec is on cpu"):
        chosen("triton", CPU)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert chosen("triton", CPU) == "triton"


def test_another_name_is_refused() -> None:
    with pytest.raises(CodecError, match="no backend 'cuda': there are cpu and triton"):
        chosen("cuda", GPU)  # type: ignore[arg-type]
