"""The codec protocol: what a model caches goes in, tensors whose bytes exist come out, and the way back.

A codec works on whole stretches of a cache, all layers at once, so that a basis may span layers. What it returns from
`encode` is all that has to be kept per token; what both sides hold anyway (bases, means, tables) counts as `nbytes`.
A method that is a cache of its own is a `CacheMaker`: it is given the whole prefix and counts its own bytes.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from eigencache.errors import CodecError

Cached = Mapping[int, tuple[Tensor, Tensor]]  # layer_idx → what the cache holds, [batch, heads, seq, dim] twice


class EncodedStretch(Protocol):
    """What is kept of a stretch of `tokens` positions from `start`."""

    @property
    def start(self) -> int:
        """Position of the first token."""
        ...

    @property
    def tokens(self) -> int:
        """How many positions, the same for all rows of the batch."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes that exist because of it."""
        ...

    def select(self, rows: Tensor) -> "EncodedStretch":
        """The given rows of the batch."""
        ...


@dataclass(frozen=True, eq=False)
class EncodedBytes:
    """A stretch of `tokens` positions from `start` as one byte string per row of the batch."""

    rows: tuple[bytes, ...]
    start: int
    tokens: int

    @property
    def nbytes(self) -> int:
        """Bytes of the strings; rows that share one string, as beams do, count once."""
        return sum(len(row) for row in {id(row): row for row in self.rows}.values())

    def select(self, rows: Tensor) -> "EncodedBytes":
        """The given rows of the batch."""
        return EncodedBytes(tuple(self.rows[i] for i in rows.tolist()), self.start, self.tokens)


@dataclass(frozen=True, eq=False)
class Encoded:
    """A stretch of `tokens` positions from `start`; every tensor has the batch as its first dimension."""

    tensors: dict[str, Tensor]
    start: int
    tokens: int

    @property
    def nbytes(self) -> int:
        """Bytes of the storages that exist, a view counted with all it keeps alive."""
        return storage_bytes(self.tensors.values())

    def select(self, rows: Tensor) -> "Encoded":
        """The given rows of the batch."""
        return Encoded({name: t[rows.to(t.device)] for name, t in self.tensors.items()}, self.start, self.tokens)


class Codec(Protocol):
    """Encodes and decodes stretches of a cache of one model."""

    @property
    def name(self) -> str:
        """What tables call it."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes of what is held once, whatever the number of tokens."""
        ...

    def encode(self, cached: Cached, start: int) -> Any:
        """What is kept of positions start, start + 1, … of every layer: something `EncodedStretch`."""
        ...

    def decode(self, encoded: Any) -> dict[int, tuple[Tensor, Tensor]]:
        """The cache's tensors again, in the dtype they had."""
        ...


@runtime_checkable
class CacheMaker(Protocol):
    """Makes caches that hold a prefix in a way of their own, for methods that are no codec: they evict, or are a package."""

    @property
    def name(self) -> str:
        """What tables call it."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes of what is held once, whatever the number of tokens."""
        ...

    def cache_of(self, prefix: Any) -> Any:
        """A new transformers cache that holds `prefix` (of `evaluate.prefix`), and nothing else of it."""
        ...

    def held(self, cache: Any) -> tuple[int, int]:
        """Tokens of all rows that such a cache stands for and the bytes it takes, before anything is read through it."""
        ...


Compressor = Codec | CacheMaker


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages behind tensors, each once."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def length_of(cached: Cached) -> int:
    """Tokens of a cache, those of its longest layer."""
    return max(keys.shape[2] for keys, _ in cached.values())


def sixteen_bit(dtype: torch.dtype) -> torch.dtype:
    """What a 16-bit cache of a model in `dtype` holds: that dtype itself, or float16 for a wider one."""
    return dtype if dtype in (torch.float16, torch.bfloat16) else torch.float16


def to_sixteen_bit(x: Tensor, what: str) -> Tensor:
    """x in 16 bits, in a storage of its own. Raises `CodecError` where a finite number would become infinite."""
    small = owned(x.to(sixteen_bit(x.dtype)))
    if not small.isfinite().all():
        raise CodecError(f"{what}: {float(x.abs().max()):.3g} does not fit into {small.dtype}")
    return small


def owned(x: Tensor) -> Tensor:
    """x contiguous in a storage that holds nothing else: a view would keep alive, and count, all it is a view of."""
    x = x.contiguous()
    return x if x.untyped_storage().nbytes() == x.nbytes else x.clone()


@dataclass(frozen=True)
class SixteenBit:
    """The cache as it is, in 16 bits: what every ratio is against; exact for models that run in 16 bits."""

    dtype: torch.dtype = torch.float32
    name: str = "16 bit"
    nbytes: int = 0

    def encode(self, cached: Cached, start: int) -> Encoded:
        """Both slots of every layer, rounded to 16 bits where they are wider."""
        tensors = {}
        for layer_idx, slots in cached.items():
            for slot, x in enumerate(slots):
                tensors[f"{layer_idx}.{slot}"] = to_sixteen_bit(x, f"layer {layer_idx}")
        return Encoded(tensors, start, length_of(cached))

    def decode(self, encoded: Encoded) -> dict[int, tuple[Tensor, Tensor]]:
        """Back in the model's dtype."""
        layers = dict.fromkeys(int(name.split(".")[0]) for name in encoded.tensors)
        return {i: tuple(encoded.tensors[f"{i}.{slot}"].to(self.dtype) for slot in (0, 1)) for i in layers}  # type: ignore[misc]
