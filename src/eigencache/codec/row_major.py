"""Tensors that a codec holds once, row by row as they are saved: what is loaded multiplies to the same last bits."""

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Self

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class RowMajor:
    """Base of frozen dataclasses whose fields are all tensors: each is contiguous, whatever it was made of."""

    def __post_init__(self) -> None:
        """In another order the same numbers multiply to other last bits."""
        for field in fields(self):
            object.__setattr__(self, field.name, getattr(self, field.name).contiguous())

    def tensors(self) -> Iterable[Tensor]:
        """All that is held."""
        return (getattr(self, field.name) for field in fields(self))

    def to(self, device: str | torch.device) -> Self:
        """The same where the cache is."""
        return type(self)(*(t.to(device) for t in self.tensors()))
