"""Isolation from the PyTorch modes of the caller: compilation, inference mode, autocast, default device and dtype."""

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

import torch

_F = TypeVar("_F", bound=Callable[..., Any])
_AUTOCAST = ("cpu", "cuda", "mps", "xpu")


def uncompiled(function: _F) -> _F:
    """Exclude a function, and everything that it calls, from `torch.compile`."""
    return torch.compiler.disable(function)  # type: ignore[return-value]


@contextmanager
def own_modes() -> Iterator[None]:
    """Leave inference mode and autocast, and set the default device to the CPU and the default dtype to float32.

    No-grad mode is kept. Tensors created inside have full precision and can be used later in any mode. The modes of the
    caller are restored on exit. Cost: microseconds for a caller that is in none of these modes.
    """
    dtype = torch.get_default_dtype()
    with ExitStack() as stack:
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.no_grad())  # leaving inference mode turns gradients on
        for kind in _AUTOCAST:
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        if dtype != torch.float32:
            stack.callback(torch.set_default_dtype, dtype)
            torch.set_default_dtype(torch.float32)
        yield


def constant(make: _F) -> _F:
    """Decorate a function whose result is cached for later calls: run it in `own_modes` and without gradients."""

    @functools.wraps(make)
    def made(*args: Any, **kwargs: Any) -> Any:
        with own_modes(), torch.no_grad():
            return make(*args, **kwargs)

    return made  # type: ignore[return-value]
