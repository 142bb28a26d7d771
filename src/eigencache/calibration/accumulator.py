"""Accumulate moments of captured tensors. Heads are blocks of layers, so one matrix per tensor serves all scopes.

At scope `all` the vectors of all layers are concatenated. The moments of a layer or of a head are diagonal blocks of that
matrix. Where it would be too wide, each layer has its own matrix, and where only scope `head` is requested, each head.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from eigencache.errors import StatisticsError
from eigencache.geometry import kind_and_frame
from eigencache.records.base import Scope
from eigencache.spectral.measure import Place
from eigencache.spectral.moments import Moments

MAX_WIDTH = 1280  # at scope `all`; a decomposition costs O(width³), about a second at this width


@dataclass(frozen=True)
class Columns:
    """The columns of one layer in the concatenated vectors: `heads` · `dim` numbers from column `start`."""

    layer_idx: int
    heads: int
    dim: int
    start: int = 0

    @property
    def width(self) -> int:
        """Numbers per token of this layer."""
        return self.heads * self.dim


@dataclass
class _Store:
    """The moments of one tensor name: of all layers together, or one per layer."""

    columns: list[Columns]
    moments: list[Moments]  # one for all columns, or one per layer
    scopes: tuple[Scope, ...] = field(default=())

    @property
    def joint(self) -> bool:
        return "all" in self.scopes


class Accumulator:
    """Moments of every captured tensor, per fold of sequences. Memory does not grow with the number of tokens."""

    def __init__(self, shapes: dict[str, list[Columns]], scopes: Sequence[Scope], *, sequences: int, budget: int) -> None:
        """Allocate as many folds, at most 16, as the budget allows.

        Args:
            shapes: tensor name → columns of its layers.
            scopes: scopes of the moments.
            sequences: number of sequences that will be added.
            budget: bytes that the moments may take.

        Raises:
            StatisticsError: not even two folds fit the budget.
        """
        self.notes: list[str] = []
        self._scopes = {name: self._affordable(name, columns, scopes) for name, columns in shapes.items()}
        self._shapes, self._stores, self.sequences = shapes, {}, sequences
        self.folds = self._most_folds(budget)
        if not self.folds:
            raise StatisticsError(
                f"The moments need {self._nbytes(2) / 2**30:.1f} GiB, more than a `memory` of {budget / 2**30:.1f} GiB. "
                "Raise `memory`, choose fewer layers, or use `scope` head."
            )

    def _affordable(self, name: str, columns: list[Columns], scopes: Sequence[Scope]) -> tuple[Scope, ...]:
        """Return the scopes, without `all` where all layers together are too wide to decompose."""
        width = sum(c.width for c in columns)
        if "all" in scopes and width > MAX_WIDTH:
            self.notes.append(f"{name}: scope all left out, {width:,} dimensions are more than {MAX_WIDTH:,}")
            scopes = [scope for scope in scopes if scope != "all"]
        return tuple(scopes)

    @staticmethod
    def _sizes(columns: list[Columns], scopes: Sequence[Scope]) -> list[tuple[int, int]]:
        """Return (width, blocks) of the moments that serve the scopes."""
        if "all" in scopes:
            return [(sum(c.width for c in columns), 1)]
        if "layer" in scopes:
            return [(c.width, 1) for c in columns]
        return [(c.dim, c.heads) for c in columns]

    def _nbytes(self, folds: int) -> int:
        sizes = [size for name, columns in self._shapes.items() for size in self._sizes(columns, self._scopes[name])]
        return sum(Moments.nbytes(width, blocks, folds) for width, blocks in sizes)

    def _most_folds(self, budget: int) -> int:
        """Return the largest number of folds, at most 16, that fits the budget and the sequences; 0 if two do not fit."""
        for folds in (16, 8, 4, 2):
            if folds <= max(2, self.sequences) and self._nbytes(folds) <= budget:
                return folds
        return 0

    def fold_of(self, sequence: int) -> int:
        """Return the fold of a sequence. Folds are contiguous in the text, so that they depend on each other least."""
        return sequence * self.folds // self.sequences

    def add(self, tensors: dict[str, dict[int, Tensor]], sequences: Sequence[int], lengths: Sequence[int]) -> None:
        """Add one batch.

        Args:
            tensors: tensor name → layer → [batch, heads, seq, dim].
            sequences: index of the sequence in each row.
            lengths: tokens of each row; the rest is padding.
        """
        rows_of: dict[int, list[int]] = {}
        for row, sequence in enumerate(sequences):
            rows_of.setdefault(self.fold_of(sequence), []).append(row)
        for name, columns in self._shapes.items():
            store = self._stores.get(name) or self._open(name, tensors[name][columns[0].layer_idx].device)
            for fold, rows in rows_of.items():
                kept = [lengths[row] for row in rows]
                parts = [_vectors(tensors[name][c.layer_idx], rows, kept) for c in columns]
                if store.joint:
                    joined = torch.cat([part.flatten(1).to(parts[0].device) for part in parts], -1)
                    store.moments[0].update(joined.unsqueeze(1), kept, fold)
                else:
                    for moments, part in zip(store.moments, parts, strict=True):
                        vectors = part if moments.blocks > 1 or part.shape[1] == 1 else part.flatten(1).unsqueeze(1)
                        moments.update(vectors.to(moments.mean.device), kept, fold)

    def _open(self, name: str, device: torch.device) -> _Store:
        device = torch.device("cpu") if device.type == "mps" else device  # MPS has no float64
        columns = self._shapes[name]
        sizes = self._sizes(columns, self._scopes[name])
        moments = [Moments(width, blocks=blocks, folds=self.folds, device=device) for width, blocks in sizes]
        self._stores[name] = _Store(columns, moments, self._scopes[name])
        return self._stores[name]

    def places(self) -> Iterator[tuple[Place, Moments]]:
        """Yield every place of the requested scopes with its moments: heads and layers, then all layers."""
        for name, store in self._stores.items():
            kind, frame = kind_and_frame(name)
            for index, c in enumerate(store.columns):
                moments, start = (store.moments[0], c.start) if store.joint else (store.moments[index], 0)
                separate = moments.blocks > 1 or (not store.joint and c.heads == 1)
                for head in range(c.heads) if "head" in store.scopes else ():
                    begin = start + head * c.dim
                    part = moments.part(head) if separate else moments.part(0, begin, begin + c.dim)
                    yield Place(c.layer_idx, head, kind, frame, "head"), part
                if "layer" in store.scopes:
                    yield Place(c.layer_idx, None, kind, frame, "layer"), moments.part(0, start, start + c.width)
            if store.joint:
                yield Place(None, None, kind, frame, "all"), store.moments[0]


def shapes_of(tensors: dict[str, dict[int, Tensor]]) -> dict[str, list[Columns]]:
    """Return the columns of the layers of each tensor name, concatenated in order, from the tensors of a batch."""
    shapes: dict[str, list[Columns]] = {}
    for name, layers in tensors.items():
        start = 0
        for layer_idx, tensor in layers.items():
            columns = Columns(layer_idx, tensor.shape[1], tensor.shape[3], start)
            shapes.setdefault(name, []).append(columns)
            start += columns.width
    return shapes


def _vectors(tensor: Tensor, rows: list[int], lengths: list[int]) -> Tensor:
    """Return the vectors of the rows without padding [n, heads, dim]."""
    if all(length == tensor.shape[2] for length in lengths):
        chosen = tensor if len(rows) == len(tensor) else tensor[rows]
        return chosen.transpose(1, 2).flatten(0, 1)
    return torch.cat([tensor[row, :, :length].transpose(0, 1) for row, length in zip(rows, lengths, strict=True)])
