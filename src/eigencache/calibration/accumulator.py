"""Accumulate moments of captured tensors. Heads are blocks of layers, so one matrix per tensor serves all scopes.

At scope `all` the vectors of all layers are concatenated. The moments of a layer or of a head are diagonal blocks of that
matrix. Where it would be too wide, scope `all` has a sample of the vectors and each layer its own matrix, and where only
scope `head` is requested, each head.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from eigencache.calibration.sampling import Sampling
from eigencache.errors import StatisticsError
from eigencache.geometry import kind_and_frame
from eigencache.records.base import Scope
from eigencache.spectral.measure import Place
from eigencache.spectral.moments import Moments

WIDEST = 1280  # dimensions of a matrix at scope `all`; a decomposition costs O(width³), about a second at this width
SAMPLED = WIDEST  # vectors of a sample of all layers, where they are wider than that
_SAMPLES = 1 / 4  # of the memory, at most


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

    def __init__(
        self,
        shapes: dict[str, list[Columns]],
        scopes: Sequence[Scope],
        *,
        sequences: int,
        tokens: int,
        budget: int,
        widest: int = WIDEST,
        sampled: int = SAMPLED,
    ) -> None:
        """Allocate as many folds, at most 16, as the budget allows.

        Args:
            shapes: tensor name → columns of its layers.
            scopes: scopes of the moments.
            sequences: number of sequences that will be added.
            tokens: number of tokens that will be added.
            budget: bytes that the moments may take.
            widest: most dimensions of a matrix at scope `all`.
            sampled: about how many vectors of all layers to keep, where they are too wide for a matrix.

        Raises:
            StatisticsError: not even two folds fit the budget.
        """
        self.samplings: dict[str, Sampling] = {}  # scope `all` of tensors that are too wide
        wide = [name for name, columns in shapes.items() if "all" in scopes and _width(columns) > widest]
        narrower: tuple[Scope, ...] = tuple(scope for scope in scopes if scope != "all")
        self._scopes = {name: narrower if name in wide else tuple(scopes) for name in shapes}
        left = budget
        if wide:
            vector = Sampling.nbytes([_width(shapes[name]) for name in wide])
            kept = max(1, min(sampled, tokens, int(_SAMPLES * budget) // vector))
            self.samplings = {name: Sampling(-(-tokens // kept)) for name in wide}
            left -= kept * vector
        self._shapes, self._stores, self.sequences = shapes, {}, sequences
        self.folds = self._most_folds(left)
        if not self.folds:
            raise StatisticsError(
                f"The moments need {self._nbytes(2) / 2**30:.1f} GiB, more than {left / 2**30:.1f} GiB of `memory`. "
                "Raise `memory`, choose fewer layers, or use `scope` head."
            )

    @staticmethod
    def _sizes(columns: list[Columns], scopes: Sequence[Scope]) -> list[tuple[int, int]]:
        """Return (width, blocks) of the moments that serve the scopes."""
        if "all" in scopes:
            return [(_width(columns), 1)]
        if "layer" in scopes:
            return [(c.width, 1) for c in columns]
        return [(c.dim, c.heads) for c in columns] if "head" in scopes else []

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
        for name, sampling in self.samplings.items():
            sampling.add([tensors[name][c.layer_idx] for c in self._shapes[name]], sequences, lengths)
        for name, columns in self._shapes.items():
            if not self._scopes[name]:
                continue
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
        """Yield every place that has a matrix, with its moments: heads and layers, then all layers."""
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


def _width(columns: list[Columns]) -> int:
    return sum(c.width for c in columns)


def _vectors(tensor: Tensor, rows: list[int], lengths: list[int]) -> Tensor:
    """Return the vectors of the rows without padding [n, heads, dim]."""
    if all(length == tensor.shape[2] for length in lengths):
        chosen = tensor if len(rows) == len(tensor) else tensor[rows]
        return chosen.transpose(1, 2).flatten(0, 1)
    return torch.cat([tensor[row, :, :length].transpose(0, 1) for row, length in zip(rows, lengths, strict=True)])
