"""The registry of codecs that can be saved: one file per kind, one decorator, nothing else to change.

A kind says how codecs of one class become a card (`card.json`) and named tensors (`codec.safetensors`), and back:

    @saved_codec("toy")
    class SavedToy(SavedKind):
        codec, card = ToyCodec, ToyCard
        ...

`folder.py` writes and reads the files, `byte_ledger.py` counts bytes; both ask this registry. Modules of this package are
imported, and so registered, when a kind is first looked up; a kind of another package registers when its module is imported.
"""

import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from functools import cache
from importlib import import_module
from typing import Any, ClassVar, Protocol, Self, TypeVar

import torch
from torch import Tensor

from eigencache.codec import saved
from eigencache.codec.base import Codec
from eigencache.codec.saved.card import CodecCard
from eigencache.errors import CodecError

TensorKind = tuple[torch.dtype, tuple[int, ...]]  # dtype and shape
Tensors = Mapping[str, Tensor]
Fault = str | None  # what is wrong, in words that follow a file's name
_Kind = TypeVar("_Kind", bound="SavedKind")
_KINDS: dict[str, "SavedKind"] = {}


class AnyCodec(Codec, Protocol):
    """A codec that can be saved: its tensors can move to a device."""

    def to(self, device: str | torch.device) -> Self:
        """Return the codec with its tensors on `device`."""
        ...


class SavedKind(ABC):
    """How codecs of one class are saved. Methods that receive a card or tensors get ones whose earlier checks passed."""

    codec: ClassVar[type]
    card: ClassVar[type[CodecCard]]

    @abstractmethod
    def entries(self, codec: Any) -> dict[str, Any]:
        """Return the fields of the card that this kind adds to `CodecCard`, without `settings` and `expected`."""

    @abstractmethod
    def tensors(self, codec: Any) -> dict[str, Tensor]:
        """Return the tensors to save, by name."""

    @abstractmethod
    def tensor_kinds(self, card: Any) -> dict[str, TensorKind]:
        """Return dtype and shape of every tensor that a card implies."""

    @abstractmethod
    def codec_from(self, card: Any, tensors: Tensors) -> Any:
        """Return the codec."""

    @abstractmethod
    def payload_nbytes(self, codec: Any, tokens: int, values_per_token: int, coded_bits: float | None) -> int:
        """Return the bytes of one encoded sequence from position 0, computed without encoding.

        Args:
            codec: The codec.
            tokens: Length of the sequence.
            values_per_token: Numbers that the model caches per token.
            coded_bits: Expected bits of a coded token, for codecs whose bytes depend on the text.

        Raises:
            CodecError: `coded_bits` is needed and None.
        """

    def card_fault(self, card: Any) -> Fault:
        """Return how a card contradicts itself, or None."""
        return None

    def value_fault(self, card: Any, tensors: Tensors) -> Fault:
        """Return which tensor holds values out of range, or None."""
        return None

    def codec_fault(self, card: Any, codec: Any) -> Fault:
        """Return how the loaded codec differs from what the card says, or None."""
        return None

    def coded_bits(self, card: Any) -> float | None:
        """Return the expected bits of a coded token; None where the bytes follow from the number of tokens."""
        return None


def saved_codec(name: str) -> Callable[[type[_Kind]], type[_Kind]]:
    """Register a kind of saved codec.

    Args:
        name: The `kind` that its cards have.

    Raises:
        ValueError: The name is taken, or is not the `kind` of the card class.
    """

    def register(kind: type[_Kind]) -> type[_Kind]:
        if name in _KINDS:
            raise ValueError(f"saved codec {name!r} is registered already, by {type(_KINDS[name]).__name__}")
        if (default := kind.card.model_fields["kind"].default) != name:
            raise ValueError(f"saved codec {name!r}: cards of {kind.card.__name__} have the kind {default!r}")
        _KINDS[name] = kind()
        return kind

    return register


def saved_kinds() -> dict[str, SavedKind]:
    """Return every registered kind by its name."""
    _import_package()
    return dict(_KINDS)


def kind_of(codec: Any) -> SavedKind:
    """Return the kind of a codec. Raises `CodecError` for a codec that cannot be saved."""
    kinds = saved_kinds()
    for kind in kinds.values():
        if isinstance(codec, kind.codec):
            return kind
    raise CodecError(f"a codec of class {type(codec).__name__} cannot be saved: the kinds are {', '.join(sorted(kinds))}")


def tensor_fault(expected: Mapping[str, TensorKind], tensors: Tensors) -> Fault:
    """Return the first tensor that is missing, unknown, of another dtype or shape than expected, or not finite."""
    if missing := sorted(expected.keys() - tensors.keys()):
        return f"tensor {missing[0]} is missing"
    if unknown := sorted(tensors.keys() - expected.keys()):
        return f"tensor {unknown[0]} is not of this codec"
    for name, kind in expected.items():
        actual = tensors[name].dtype, tuple(tensors[name].shape)
        if actual != kind:
            return f"tensor {name} is {actual[0]} {list(actual[1])}, the card says {kind[0]} {list(kind[1])}"
        if not tensors[name].isfinite().all():
            return f"tensor {name} holds NaN or infinite values"
    return None


@cache
def _import_package() -> None:
    """Import every module of this package, so that its kinds register."""
    for module in pkgutil.iter_modules(saved.__path__, f"{saved.__name__}."):
        import_module(module.name)
