"""Captured tensors into moments: one matrix per tensor name serves all scopes, since heads are blocks of layers.

At scope `all` the layers' vectors are concatenated, and a layer's or a head's moments are blocks on the diagonal of
that one matrix. Where it would be too wide, layers are kept apart, and where only heads are asked for, heads are.
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

MAX_WIDTH = 1280  # of a scope `all`: decompositions take width^3, about a second here


@dataclass(frozen=True)
class Columns:
    """Where one layer's heads stand in a row of numbers: `heads` times `dim` of them from `start`."""

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
    """The moments of one tensor name: of all layers in one, or of each layer."""

    columns: list[Columns]
    moments: list[Moments]  # one for all columns, or one for each
    scopes: tuple[Scope, ...] = field(default=())

    @property
    def joint(self) -> bool:
        return "all" in self.scopes


class Accumulator:
    """Moments of every captured tensor, per fold of sequences; its memory does not grow with the tokens."""

    def __init__(self, shapes: dict[str, list[Columns]], scopes: Sequence[Scope], *, sequences: int, budget: int) -> None:
        """`shapes`: tensor name → its layers. `budget`: bytes for moments; with less of it there are fewer folds.

        Raises `StatisticsError` when not even two folds fit.
        """
        self.notes: list[str] = []
        self._scopes = {name: self._affordable(name, columns, scopes) for name, columns in shapes.items()}
        self._shapes, self._stores, self.sequences = shapes, {}, sequences
        self.folds = self._most_folds(budget)
        if not self.folds:
            raise StatisticsError(
                f"moments need {self._nbytes(2) / 2**30:.1f} GiB, the budget is {budget / 2**30:.1f} GiB: "
                "look at fewer layers, at `scope` head, or raise `memory`"
            )

    def _affordable(self, name: str, columns: list[Columns], scopes: Sequence[Scope]) -> tuple[Scope, ...]:
        """The scopes without `all` where all layers together are too wide to be decomposed in reasonable time."""
        width = sum(c.width for c in columns)
        if "all" in scopes and width > MAX_WIDTH:
            self.notes.append(f"{name}: scope all left out, {width:,} dimensions are more than {MAX_WIDTH:,}")
            scopes = [scope for scope in scopes if scope != "all"]
        return tuple(scopes)

    @staticmethod
    def _sizes(columns: list[Columns], scopes: Sequence[Scope]) -> list[tuple[int, int]]:
        """(width, blocks) of the moments that serve the scopes."""
        if "all" in scopes:
            return [(sum(c.width for c in columns), 1)]
        if "layer" in scopes:
            return [(c.width, 1) for c in columns]
        return [(c.dim, c.heads) for c in columns]

    def _nbytes(self, folds: int) -> int:
        sizes = [size for name, columns in self._shapes.items() for size in self._sizes(columns, self._scopes[name])]
        return sum(Moments.nbytes(width, blocks, folds) for width, blocks in sizes)

    def _most_folds(self, budget: int) -> int:
        """The most folds, 16 at most, that fit the budget and the number of sequences; 0 if not even two do."""
        for folds in (16, 8, 4, 2):
            if folds <= max(2, self.sequences) and self._nbytes(folds) <= budget:
                return folds
        return 0

    def fold_of(self, sequence: int) -> int:
        """Sequences of one fold stand beside each other in the text, so that folds depend on each other least."""
        return sequence * self.folds // self.sequences

    def add(self, tensors: dict[str, dict[int, Tensor]], sequences: Sequence[int], lengths: Sequence[int]) -> None:
        """Add one batch: tensor name → layer → [batch, heads, seq, dim]; what lies beyond a row's length is padding."""
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
        device = torch.device("cpu") if device.type == "mps" else device  # no float64 there
        columns = self._shapes[name]
        sizes = self._sizes(columns, self._scopes[name])
        moments = [Moments(width, blocks=blocks, folds=self.folds, device=device) for width, blocks in sizes]
        self._stores[name] = _Store(columns, moments, self._scopes[name])
        return self._stores[name]

    def places(self) -> Iterator[tuple[Place, Moments]]:
        """Every place that was asked for with its moments, one block each: heads, layers, then all layers."""
        for name, store in self._stores.items():
            kind, frame = kind_and_frame(name)
            for index, c in enumerate(store.columns):
                moments, start = (store.moments[0], c.start) if store.joint else (store.moments[index], 0)
                apart = moments.blocks > 1 or (not store.joint and c.heads == 1)
                for head in range(c.heads) if "head" in store.scopes else ():
                    begin = start + head * c.dim
                    part = moments.part(head) if apart else moments.part(0, begin, begin + c.dim)
                    yield Place(c.layer_idx, head, kind, frame, "head"), part
                if "layer" in store.scopes:
                    yield Place(c.layer_idx, None, kind, frame, "layer"), moments.part(0, start, start + c.width)
            if store.joint:
                yield Place(None, None, kind, frame, "all"), store.moments[0]


def shapes_of(tensors: dict[str, dict[int, Tensor]]) -> dict[str, list[Columns]]:
    """The layers behind each tensor name, one after the other, as a first batch shows them."""
    shapes: dict[str, list[Columns]] = {}
    for name, layers in tensors.items():
        start = 0
        for layer_idx, tensor in layers.items():
            columns = Columns(layer_idx, tensor.shape[1], tensor.shape[3], start)
            shapes.setdefault(name, []).append(columns)
            start += columns.width
    return shapes


def _vectors(tensor: Tensor, rows: list[int], lengths: list[int]) -> Tensor:
    """The rows' vectors without padding, [n, heads, dim]."""
    if all(length == tensor.shape[2] for length in lengths):
        chosen = tensor if len(rows) == len(tensor) else tensor[rows]
        return chosen.transpose(1, 2).flatten(0, 1)
    return torch.cat([tensor[row, :, :length].transpose(0, 1) for row, length in zip(rows, lengths, strict=True)])
