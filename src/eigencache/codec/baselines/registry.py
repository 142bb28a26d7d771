"""The registry of baselines: a baseline is one file with one decorated function, and tests run over all of them.

    @baseline("toy", "rounds every number")
    def toy_codecs(inputs: BaselineInputs) -> dict[str, Codec]:
        return {f"{bits}": Toy(bits, inputs.dtype) for bits in (8, 4)}

Modules of this package are imported, and so registered, when the registry is first read; a baseline of another package
registers when its module is imported.
"""

import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from eigencache.codec import baselines as package
from eigencache.codec.base import Cached, Codec
from eigencache.codec.layout import Layout, Rotations

Moments = Mapping[int, Tensor]  # layer_idx → second moments [kv_heads, d, d]
Weights = Mapping[int, tuple[Tensor, Tensor | None]]  # layer_idx → [keys and values, hidden], and bias or None
_T = TypeVar("_T")


class BaselineInputs(Protocol):
    """What a baseline can be made from: facts of one model and measurements on its calibration set."""

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the model."""
        ...

    @property
    def widths(self) -> Mapping[int, tuple[int, int]]:
        """Layer → width of a head in both slots."""
        ...

    @property
    def rates(self) -> Sequence[float]:
        """Bits per value to test for variable-rate methods."""
        ...

    @property
    def by_slot(self) -> Sequence[tuple[Layout, Tensor]]:
        """Per slot the layout of all layers, and calibration vectors [n, width]."""
        ...

    @property
    def moments(self) -> tuple[Moments, Moments]:
        """Second moments of queries, and of values weighted by attention."""
        ...

    @property
    def cached(self) -> Cached:
        """The cache of a few calibration sequences."""
        ...

    @property
    def projections(self) -> tuple[Weights, int, Rotations]:
        """Stacked weights [W_K; W_V] of every layer, the number of KV heads, and the rotations of the keys."""
        ...

    def once(self, name: str, fit: Callable[[], _T]) -> _T:
        """Return what `fit` returns; it is called once per name."""
        ...


@dataclass(frozen=True)
class Baseline:
    """A registered baseline.

    Args:
        about: One line for tables.
        codecs: Makes one codec per operating point, by the name of the point.
        fitted: Whether the calibration set matters.
    """

    about: str
    codecs: Callable[[BaselineInputs], Mapping[str, Codec]]
    fitted: bool


_Codecs = TypeVar("_Codecs", bound=Callable[[BaselineInputs], Mapping[str, Codec]])
_BASELINES: dict[str, Baseline] = {}


def baseline(name: str, about: str, *, fitted: bool = False) -> Callable[[_Codecs], _Codecs]:
    """Register a function that makes the codecs of a baseline.

    Args:
        name: Name of the baseline.
        about: One line for tables.
        fitted: Whether the calibration set matters.

    Raises:
        ValueError: The name is taken.
    """

    def register(codecs: _Codecs) -> _Codecs:
        if name in _BASELINES:
            raise ValueError(f"baseline {name!r} is registered already")
        _BASELINES[name] = Baseline(about, codecs, fitted)
        return codecs

    return register


def baselines() -> dict[str, Baseline]:
    """Return every registered baseline by its name."""
    _import_package()
    return dict(_BASELINES)


@cache
def _import_package() -> None:
    """Import every module of this package, so that its baselines register."""
    for module in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
        import_module(module.name)
