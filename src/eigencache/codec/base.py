"""The codec protocol: a codec turns the tensors of a cache into tensors or bytes that are stored, and back.

A codec works on a stretch of consecutive tokens, all layers at once, so that a basis may span layers. What `encode`
returns is everything stored per token; bases, means and tables are stored once and count as the codec's `nbytes`. A
method that replaces the cache itself, such as eviction, is a `CacheMaker`: it receives the whole prefix and counts its
own bytes.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from eigencache.errors import CodecError

Cached = Mapping[int, tuple[Tensor, Tensor]]  # layer_idx → both slots of a cache layer, [batch, heads, seq, dim] each


class EncodedStretch(Protocol):
    """What is stored of `tokens` tokens from position `start`."""

    @property
    def start(self) -> int:
        """Position of the first token."""
        ...

    @property
    def tokens(self) -> int:
        """Number of tokens, the same for all rows of the batch."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes that are stored."""
        ...

    def select(self, rows: Tensor) -> "EncodedStretch":
        """Return the given rows of the batch."""
        ...


@dataclass(frozen=True, eq=False)
class EncodedBytes:
    """A stretch of `tokens` tokens from position `start` as one byte string per row of the batch."""

    rows: tuple[bytes, ...]
    start: int
    tokens: int

    @property
    def nbytes(self) -> int:
        """Bytes of the strings; rows that share one string, as beams do, count once."""
        return sum(len(row) for row in {id(row): row for row in self.rows}.values())

    def select(self, rows: Tensor) -> "EncodedBytes":
        """Return the given rows of the batch."""
        return EncodedBytes(tuple(self.rows[i] for i in rows.tolist()), self.start, self.tokens)


@dataclass(frozen=True, eq=False)
class Encoded:
    """A stretch of `tokens` tokens from position `start` as tensors whose first dimension is the batch."""

    tensors: dict[str, Tensor]
    start: int
    tokens: int

    @property
    def nbytes(self) -> int:
        """Bytes of the storages behind the tensors; a view counts with the whole storage it keeps alive."""
        return storage_bytes(self.tensors.values())

    def select(self, rows: Tensor) -> "Encoded":
        """Return the given rows of the batch."""
        return Encoded({name: t[rows.to(t.device)] for name, t in self.tensors.items()}, self.start, self.tokens)


class Codec(Protocol):
    """Encodes and decodes stretches of a cache of one model."""

    @property
    def name(self) -> str:
        """Name in tables."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes stored once, whatever the number of tokens: bases, means, tables."""
        ...

    def encode(self, cached: Cached, start: int) -> Any:
        """Encode positions start, start + 1, … of every layer; returns an `EncodedStretch`."""
        ...

    def decode(self, encoded: Any) -> dict[int, tuple[Tensor, Tensor]]:
        """Return the cache's tensors in the model's dtype."""
        ...


class LoadedPrefix(Protocol):
    """What a `CacheMaker` needs of the tokens that a model has read (`evaluate.prefix.Prefix` has it)."""

    @property
    def loaded(self) -> Any:
        """An object with the attribute `model`, the transformers model that read the tokens."""
        ...

    @property
    def ids(self) -> Tensor:
        """Token ids [batch, seq]."""
        ...

    @property
    def stored(self) -> Cached:
        """What the layers of the model stored while they read `ids`."""
        ...


@runtime_checkable
class CacheMaker(Protocol):
    """Makes caches that store a prefix in their own way: for eviction methods and wrapped packages."""

    @property
    def name(self) -> str:
        """Name in tables."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes stored once, whatever the number of tokens."""
        ...

    def cache_of(self, prefix: LoadedPrefix) -> Any:
        """Return a new transformers cache that holds the prefix and nothing else."""
        ...

    def held(self, cache: Any) -> tuple[int, int]:
        """Return the tokens of all rows that such a cache represents, and its bytes, before anything is read through it."""
        ...


Compressor = Codec | CacheMaker


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of the storages behind tensors; a shared storage counts once."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def length_of(cached: Cached) -> int:
    """Return the number of tokens in the longest layer of a cache."""
    return max(keys.shape[2] for keys, _ in cached.values())


def layers_of(names: Iterable[str]) -> list[int]:
    """Return the layers of tensors named `LAYER.…`, in order and without repetition."""
    return list(dict.fromkeys(int(name.split(".")[0]) for name in names))


def sixteen_bit(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of a 16-bit cache of a model in `dtype`: that dtype itself, or float16 for a wider one."""
    return dtype if dtype in (torch.float16, torch.bfloat16) else torch.float16


def to_sixteen_bit(x: Tensor, what: str) -> Tensor:
    """Return x in 16 bits with a storage of its own.

    Args:
        x: Numbers in any floating-point dtype.
        what: What they are, to begin an error message.

    Raises:
        CodecError: x holds NaN or infinite values, or a finite one that would become infinite.
    """
    small = owned(x.to(sixteen_bit(x.dtype)))
    if not small.isfinite().all():
        largest = float(x.abs().max())
        raise CodecError(f"{what}: {largest:.3g} does not fit into {small.dtype}: load the model with `dtype` bfloat16")
    return small


def owned(x: Tensor) -> Tensor:
    """Return x contiguous in a storage of its own: a view would keep alive, and count, the whole tensor behind it."""
    x = x.contiguous()
    return x if x.untyped_storage().nbytes() == x.nbytes else x.clone()


@dataclass(frozen=True)
class SixteenBit:
    """The uncompressed cache in 16 bits, the reference of every ratio; exact for models that run in 16 bits.

    `dtype` is the model's.
    """

    dtype: torch.dtype = torch.float32
    name: str = "16 bit"
    nbytes: int = 0

    def encode(self, cached: Cached, start: int) -> Encoded:
        """Round both slots of every layer to 16 bits.

        Raises:
            CodecError: A number does not fit.
        """
        tensors = {}
        for layer_idx, slots in cached.items():
            for slot, x in enumerate(slots):
                tensors[f"{layer_idx}.{slot}"] = to_sixteen_bit(x, f"layer {layer_idx}")
        return Encoded(tensors, start, length_of(cached))

    def decode(self, encoded: Encoded) -> dict[int, tuple[Tensor, Tensor]]:
        """Return the cache in the model's dtype."""
        layers = layers_of(encoded.tensors)
        return {i: tuple(encoded.tensors[f"{i}.{slot}"].to(self.dtype) for slot in (0, 1)) for i in layers}  # type: ignore[misc]
