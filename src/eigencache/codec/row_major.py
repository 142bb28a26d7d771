"""Tensors in row-major order, as they are saved: a matrix product depends on the memory order in its last bits."""

from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from typing import Any, Self

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class RowMajor:
    """Base class of frozen dataclasses whose fields are tensors, other such dataclasses, or neither.

    Tensors are made contiguous. Fields that are neither are not stored with a codec.
    """

    def __post_init__(self) -> None:
        """Make every tensor contiguous."""
        for name, value in self._stored().items():
            if isinstance(value, Tensor):
                object.__setattr__(self, name, value.contiguous())

    def tensors(self) -> Iterable[Tensor]:
        """Yield all tensors, in the order of the fields."""
        for value in self._stored().values():
            yield from (value,) if isinstance(value, Tensor) else value.tensors()

    def to(self, device: str | torch.device) -> Self:
        """Return a copy with its tensors on `device`."""
        return replace(self, **{name: value.to(device) for name, value in self._stored().items()})

    def _stored(self) -> dict[str, Any]:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, Tensor | RowMajor)}
