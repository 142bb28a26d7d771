"""Low-rank compression: rank-r coefficients of keys, values or latents in a fitted basis (THEORY 5).

A transform works on one head, on a layer or on all layers, and on keys before or after rotation. Slots of the cache that
no transform covers are stored in 16 bits and counted, and so are the first tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from eigencache.codec.base import Cached, Encoded, length_of, to_sixteen_bit
from eigencache.codec.layout import Part, Rotations, Slots, by_layer, columns_of, rotated, slots_of, unrotated
from eigencache.codec.quantization.grouped import GROUP, QuantizedGroups, dequantize, quantize
from eigencache.codec.sinks_and_window import middle_of
from eigencache.errors import CodecError
from eigencache.spectral.transform import Transform

CoefficientBits = Literal[16, 8, 4]


@dataclass(frozen=True, eq=False)
class PCAGroup:
    """The parts whose columns, concatenated, one transform works on."""

    parts: tuple[Part, ...]
    transform: Transform


@dataclass(frozen=True, eq=False)
class PCACodec:
    """Rank-r coefficients for the slots in `groups`; all other slots in 16 bits.

    Args:
        name: Name in tables.
        groups: Transforms and the parts they work on.
        rotations: Layer → slot and rotation, for slots whose transform works before rotation.
        dtype: The model's.
        bits: Bits of a stored coefficient.
        sinks: Tokens at positions 0, 1, … that are stored in 16 bits, in all slots.
    """

    name: str
    groups: tuple[PCAGroup, ...]
    rotations: Rotations
    dtype: torch.dtype
    bits: CoefficientBits = 16
    sinks: int = 0

    def __post_init__(self) -> None:
        """Make bases contiguous, as they are stored: the memory order changes the last bits of a product."""
        object.__setattr__(self, "groups", _with_transforms(self.groups, _row_by_row))

    @property
    def rank(self) -> int:
        """Coefficients of the group that has most."""
        return max(group.transform.rank for group in self.groups)

    @property
    def nbytes(self) -> int:
        """Bytes of all bases and means; a transform that several groups share counts once."""
        return sum({id(group.transform): group.transform.nbytes for group in self.groups}.values())

    def truncated(self, rank: int, name: str | None = None, bits: CoefficientBits | None = None) -> "PCACodec":
        """Return the codec with fewer coefficients.

        Args:
            rank: Coefficients per group; a group that has fewer keeps all of its own.
            name: Name in tables; default: unchanged.
            bits: Bits of a stored coefficient; default: unchanged.

        Raises:
            CodecError: No group has so high a rank.
        """
        if not 1 <= rank <= self.rank:
            raise CodecError(f"rank {rank} is out of range: {self.name} has ranks 1 to {self.rank}")
        groups = _with_transforms(self.groups, lambda transform: transform.truncated(min(rank, transform.rank)))
        return replace(self, groups=groups, name=name or self.name, bits=bits or self.bits)

    def to(self, device: str | torch.device) -> "PCACodec":
        """Return the codec with its bases on `device`; groups that share a transform still share it."""
        return replace(self, groups=_with_transforms(self.groups, lambda transform: transform.to(torch.float32, device)))

    def encode(self, cached: Cached, start: int) -> Encoded:
        """Encode a stretch as coefficients of every group, and as 16-bit tensors of what no group covers.

        Raises:
            CodecError: The cache has other shapes than the codec was fitted for, or holds NaN or values out of range.
        """
        tensors: dict[str, Tensor] = {}
        tokens = length_of(cached)
        first, _ = middle_of(tokens, start, self.sinks, 0)
        if first:
            for layer_idx, both in cached.items():
                for slot, x in enumerate(both):
                    tensors[f"first.{layer_idx}.{slot}"] = to_sixteen_bit(x[:, :, :first], f"layer {layer_idx}")
            cached = {i: (keys[:, :, first:], values[:, :, first:]) for i, (keys, values) in cached.items()}
        if first < tokens:
            self._encode_rest(tensors, cached, start + first)
        return Encoded(tensors, start, tokens)

    def _encode_rest(self, tensors: dict[str, Tensor], cached: Cached, start: int) -> None:
        slots = unrotated(cached, self.rotations, start)
        for index, group in enumerate(self.groups):
            vectors = torch.cat([columns_of(slots, part) for part in group.parts], -1)
            self._store(tensors, index, group.transform.encode(vectors))
        covered = {(part.layer_idx, part.slot) for group in self.groups for part in group.parts}
        for layer_idx, both in cached.items():
            for slot, x in enumerate(both):
                if (layer_idx, slot) not in covered:
                    tensors[f"raw.{layer_idx}.{slot}"] = to_sixteen_bit(x, f"layer {layer_idx}")

    def decode(self, encoded: Encoded) -> dict[int, tuple[Tensor, Tensor]]:
        """Return the cache's tensors, keys rotated again, in the model's dtype."""
        first, _ = middle_of(encoded.tokens, encoded.start, self.sinks, 0)
        rest = self._decode_rest(encoded.tensors, encoded.start + first) if first < encoded.tokens else {}
        exact = _by_slot(encoded.tensors, "first")
        if exact and rest:
            rest = {key: torch.cat([x.to(self.dtype), rest[key].to(self.dtype)], 2) for key, x in exact.items()}
        return by_layer(rest or exact, self.dtype)

    def _decode_rest(self, tensors: dict[str, Tensor], start: int) -> Slots:
        columns: list[tuple[Part, Tensor]] = []
        for index, group in enumerate(self.groups):
            vectors = group.transform.decode(self._load(tensors, index, group.transform.rank))
            columns += zip(group.parts, vectors.split([part.width for part in group.parts], -1), strict=True)
        return rotated(slots_of(columns), self.rotations, start) | _by_slot(tensors, "raw")

    def _store(self, tensors: dict[str, Tensor], index: int, y: Tensor) -> None:
        what = f"{self.name}: group {index}"
        if self.bits == 16:
            tensors[f"{index}"] = to_sixteen_bit(y, what)
            return
        if self.bits not in (4, 8):
            raise CodecError(f"`bits` is {self.bits}: use 16, 8 or 4")
        for field, tensor in quantize(y, self.bits, dim=-2, what=what)._asdict().items():
            tensors[f"{index}.{field}"] = tensor

    def _load(self, tensors: dict[str, Tensor], index: int, rank: int) -> Tensor:
        if self.bits == 16:
            return tensors[f"{index}"]
        quantized = QuantizedGroups(*(tensors[f"{index}.{field}"] for field in QuantizedGroups._fields))
        return dequantize(quantized, self.bits, rank, dim=-2)

    def payload_nbytes(self, tokens: int, raw_values_per_token: int) -> int:
        """Return the bytes that `encode` makes of one sequence, computed without encoding.

        Args:
            tokens: Tokens from position 0 on.
            raw_values_per_token: Numbers per token that no group covers.
        """
        first = min(tokens, self.sinks)
        values_per_token = sum(group.transform.width for group in self.groups) + raw_values_per_token
        return 2 * first * values_per_token + self._rest_nbytes(tokens - first, raw_values_per_token)

    def _rest_nbytes(self, tokens: int, raw_values_per_token: int) -> int:
        ranks = [group.transform.rank for group in self.groups]
        if self.bits == 16:
            return 2 * tokens * (sum(ranks) + raw_values_per_token)
        scales = 4 * -(-tokens // GROUP) * sum(ranks)
        return tokens * sum(-(-rank * self.bits // 8) for rank in ranks) + scales + 2 * tokens * raw_values_per_token


def _with_transforms(groups: tuple[PCAGroup, ...], change: Callable[[Transform], Transform]) -> tuple[PCAGroup, ...]:
    """Change every transform once, so that groups that share one share the changed one."""
    changed = {id(group.transform): change(group.transform) for group in groups}
    return tuple(PCAGroup(group.parts, changed[id(group.transform)]) for group in groups)


def _by_slot(tensors: dict[str, Tensor], role: str) -> Slots:
    """Return the tensors named `role.LAYER.SLOT`."""
    names = [name.split(".") for name in tensors if name.startswith(f"{role}.")]
    return {(int(layer_idx), int(slot)): tensors[f"{role}.{layer_idx}.{slot}"] for _, layer_idx, slot in names}


def _row_by_row(transform: Transform) -> Transform:
    return Transform(transform.mean, transform.encoder.contiguous(), transform.decoder.contiguous(), transform.spectrum)
