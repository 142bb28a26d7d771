"""Moving a codec to a device: every tensor it contains, each moved once."""

from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

_T = TypeVar("_T")


def placed(codec: _T, device: str | torch.device) -> _T:
    """Return the codec with all its tensors on `device`: by its own `to` where it has one, else field by field.

    Tensors that several fields share stay shared. NumPy arrays stay on the CPU, which encodes.
    """
    return _placed(codec, torch.device(device), {})


def _placed(x: Any, device: torch.device, seen: dict[int, Any]) -> Any:
    if id(x) in seen:
        return seen[id(x)]
    if isinstance(x, torch.dtype | str | int | float | bytes | None):
        return x
    if isinstance(x, Tensor) or (hasattr(x, "to") and not isinstance(x, type)):
        moved = x.to(device)
    elif isinstance(x, Mapping):
        moved = {key: _placed(value, device, seen) for key, value in x.items()}
    elif isinstance(x, tuple) and hasattr(x, "_fields"):
        moved = type(x)(*(_placed(value, device, seen) for value in x))
    elif isinstance(x, list | tuple):
        moved = type(x)(_placed(value, device, seen) for value in x)
    elif is_dataclass(x) and not isinstance(x, type):
        changed = {f.name: _placed(getattr(x, f.name), device, seen) for f in fields(x) if f.init}
        same = all(value is getattr(x, name) for name, value in changed.items())
        moved = x if same else replace(x, **changed)
    else:
        moved = x
    seen[id(x)] = moved
    return moved


def tensors_in(x: Any) -> Iterator[Tensor]:
    """Yield every tensor that a codec contains, those in nested containers and dataclasses included."""
    if isinstance(x, Tensor):
        yield x
    elif isinstance(x, Mapping):
        for value in x.values():
            yield from tensors_in(value)
    elif isinstance(x, list | tuple):
        for value in x:
            yield from tensors_in(value)
    elif is_dataclass(x) and not isinstance(x, type):
        for field in fields(x):
            if field.init:
                yield from tensors_in(getattr(x, field.name))
