"""Modes of PyTorch that a caller may be in, and that the project's own mathematics does not depend on."""

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

import torch

_F = TypeVar("_F", bound=Callable[..., Any])
_AUTOCAST = ("cpu", "cuda", "mps", "xpu")


def uncompiled(function: _F) -> _F:
    """Return the function as `torch.compile` leaves it alone, with all that it calls."""
    return torch.compiler.disable(function)  # type: ignore[return-value]


@contextmanager
def own_modes() -> Iterator[None]:
    """Leave inference mode, autocast, and default devices and dtypes other than CPU and float32; no-grad mode is kept.

    Tensors that are made inside can be kept: they serve calls in any mode, at full precision. Costs microseconds where a
    caller is in none of these modes.
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
    """Decorate a function whose result is kept for later calls: it runs in `own_modes` and without gradients."""

    @functools.wraps(make)
    def made(*args: Any, **kwargs: Any) -> Any:
        with own_modes(), torch.no_grad():
            return make(*args, **kwargs)

    return made  # type: ignore[return-value]
