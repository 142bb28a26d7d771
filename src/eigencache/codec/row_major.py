"""Tensors that a codec holds once, row by row as they are saved: what is loaded multiplies to the same last bits."""

from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from typing import Any, Self

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class RowMajor:
    """Base of frozen dataclasses of tensors, of others of this kind, and of what is not held: tensors are contiguous."""

    def __post_init__(self) -> None:
        """In another order the same numbers multiply to other last bits."""
        for name, value in self._held().items():
            if isinstance(value, Tensor):
                object.__setattr__(self, name, value.contiguous())

    def tensors(self) -> Iterable[Tensor]:
        """All that is held."""
        for value in self._held().values():
            yield from (value,) if isinstance(value, Tensor) else value.tensors()

    def to(self, device: str | torch.device) -> Self:
        """The same where the cache is."""
        return replace(self, **{name: value.to(device) for name, value in self._held().items()})

    def _held(self) -> dict[str, Any]:
        found = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in found.items() if isinstance(value, Tensor | RowMajor)}
