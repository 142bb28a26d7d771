"""Modes of PyTorch that a caller may be in, and that the project's own mathematics does not depend on."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

_F = TypeVar("_F", bound=Callable[..., Any])


def uncompiled(function: _F) -> _F:
    """The function, run as it stands where `torch.compile` meets it, with all that it calls."""
    return torch.compiler.disable(function)  # type: ignore[return-value]


@contextmanager
def own_modes() -> Iterator[None]:
    """Without inference mode and autocast: constants that are made inside serve calls of any kind, at full precision."""
    with torch.inference_mode(False), torch.autocast("cpu", enabled=False):
        if torch.cuda.is_available():
            with torch.autocast("cuda", enabled=False):
                yield
        else:
            yield
