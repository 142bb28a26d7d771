"""Sample cached vectors of a text, one per token: keys before rotation and values of all layers, concatenated.

A codec encodes with the same code that brings these vectors into their layout.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor

from eigencache.calibration.session import Session
from eigencache.codec.eigen.position_means import PositionMeans
from eigencache.codec.layout import Layout, Part
from eigencache.corpora.sequences import Sequences
from eigencache.errors import NonFiniteError, StatisticsError, UnsupportedArchitectureError
from eigencache.memory import release
from eigencache.models.tapped_cache import tapped_cache
from eigencache.spectral.rope import Rotation, joined, pairs
from eigencache.spectral.spectrum import FLOAT32, dead_dimensions, variances_and_mean_squares

_ROWS = 1024  # vectors at a time
_LEAST_UNIT = 1e-3  # of the largest deviation of a column; columns that deviate less lose nothing in float16 down to 1e-7


@dataclass(frozen=True, eq=False)
class Units:
    """Numbers in float16: x = offset + unit · h. Half the memory of float32, with 11 bits of the distance from the offset.

    Args:
        offset: what is subtracted from every column [width].
        unit: what it is divided by [width], about its standard deviation.
    """

    offset: Tensor
    unit: Tensor

    @classmethod
    def of(cls, x: Tensor) -> "Units":
        """Return units for vectors like `x` [n, width]: the mean and the standard deviation of every column."""
        deviation = x.double().std(0, correction=0)
        least = _LEAST_UNIT * float(deviation.max()) or 1.0
        return cls(x.mean(0, dtype=torch.float64).float(), deviation.clamp_min(least).float())

    def rounded(self, x: Tensor) -> Tensor:
        """Return h in float16 of x [n, width]; beyond 65,504 units it is the largest number of float16."""
        largest = torch.finfo(torch.float16).max
        return ((x - self.offset) / self.unit).clamp_(-largest, largest).half()


@dataclass(frozen=True, eq=False)
class SampledVectors:
    """Cached vectors of the tokens of several sequences.

    Args:
        layout: heads and layers of the columns.
        stored: one row per token [n, width], sequence after sequence: float32, or float16 in `units`.
        ids: token ids [n].
        lengths: tokens of each sequence.
        units: units of `stored`; None: it holds the vectors as they are.
    """

    layout: Layout
    stored: Tensor
    ids: Tensor
    lengths: tuple[int, ...]
    units: Units | None = None

    def __len__(self) -> int:
        """Return the number of tokens."""
        return len(self.ids)

    def vectors(self, rows: Tensor | slice = slice(None), start: int = 0, stop: int | None = None) -> Tensor:
        """Return a copy of vectors in float32.

        Args:
            rows: which tokens [m].
            start: first column.
            stop: end of the columns, exclusive; None: all.

        Returns:
            [m, stop − start].
        """
        x = self.stored[:, start:stop][rows].to(torch.float32, copy=True)
        return x if self.units is None else x.mul_(self.units.unit[start:stop]).add_(self.units.offset[start:stop])

    def parts(self) -> Iterator[Tensor]:
        """Yield all vectors in float32, some thousands at a time."""
        for first in range(0, len(self), _ROWS):
            yield self.vectors(slice(first, first + _ROWS))

    @property
    def positions(self) -> Tensor:
        """Position of every token in its sequence [n]."""
        return torch.cat([torch.arange(length) for length in self.lengths])

    @property
    def mean(self) -> Tensor:
        """Mean vector [width] float32."""
        total = sum(x.sum(0, dtype=torch.float64) for x in self.parts())
        return (total / len(self)).float()  # type: ignore[union-attr]

    @cached_property
    def live(self) -> list[Tensor]:
        """Dimensions that vary by more than rounding, bool [heads, dim] per part; the others are dead.

        A pair of keys whose rotation is undone is mixed by the error of its angle, which the model rounds to float32.
        """
        live, moments = [], variances_and_mean_squares(self.parts())
        for part, (start, stop) in zip(self.layout.parts, self.layout.spans, strict=True):
            variances, squares = (m[start:stop].unflatten(0, (-1, part.dim)) for m in moments)
            dead = torch.stack([dead_dimensions(*head) for head in zip(variances, squares, strict=True)])
            slot, rotation = self.layout.rotations.get(part.layer_idx, (None, None))
            if rotation is not None and slot == part.slot:
                width, neighbors = 2 * len(rotation.frequencies), rotation.pairing != "half"
                angles = FLOAT32 * max(self.lengths) * rotation.frequencies.cpu()
                mixed = sum(pairs(squares[:, :width], neighbors)) * angles.square()
                dead[:, :width] |= variances[:, :width] <= joined(mixed, mixed, neighbors)
            live.append(~dead)
        return live

    def sequences(self, first: int, stop: int) -> "SampledVectors":
        """Return the sequences first … stop − 1; their tensors are views of these."""
        edges = [0, *accumulate(self.lengths)]
        tokens = slice(edges[first], edges[stop])
        return replace(self, stored=self.stored[tokens], ids=self.ids[tokens], lengths=self.lengths[first:stop])

    def less_positions(self, means: PositionMeans | None) -> "SampledVectors":
        """Return the samples with the means by position subtracted. The sequences must be whole, first tokens included."""
        if means is None:
            return self
        stored, rows = torch.empty_like(self.stored), torch.arange(len(self)).split(list(self.lengths))
        for part in rows:
            x = self.vectors(part) - means.at(torch.arange(len(part)))
            stored[part] = x if self.units is None else self.units.rounded(x)
        return replace(self, stored=stored)


@torch.no_grad()
def sample_vectors(
    session: Session, sequences: Sequences, rotations: dict[int, Rotation], *, what: str = "vectors"
) -> SampledVectors:
    """Capture the vectors of all sequences.

    Args:
        session: the model and how it is run.
        sequences: the text, as `affordable` returns it.
        rotations: rotation of the keys by layer.
        what: name of the work in progress reports.

    Raises:
        NonFiniteError: the model caches NaN or infinite values.
    """
    session.require_readable(sequences)
    layout = units = None
    stored, lengths = torch.empty(0), [len(ids) for ids in sequences.ids]
    filled = 0
    for input_ids, _, indices in sequences.batches(session.batch_size, pad_id=0):
        cache, slots = tapped_cache(session.loaded.model)
        session.loaded.model.base_model(input_ids=input_ids.to(session.loaded.device), past_key_values=cache, use_cache=True)
        _check_finite(slots)
        if layout is None:
            layout = layout_of(slots, rotations, mla=session.loaded.geometry.mla is not None)
            stored = torch.empty(sum(lengths), layout.width, dtype=torch.float16)  # filled in place: no second copy
        for row, index in enumerate(indices):  # one sequence at a time, to hold no copy of the batch
            alone = {i: (keys[row : row + 1], values[row : row + 1]) for i, (keys, values) in slots.items()}
            x = layout.vectors(alone, 0)[0, : lengths[index]]
            units = units or Units.of(x)  # of the first sequence, so that they do not depend on the batches
            stored[filled : filled + len(x)] = units.rounded(x)
            filled += len(x)
        del cache, slots, alone, x
        release()
        session.on_progress(what, indices[-1] + 1, len(lengths))
    assert layout is not None  # `pack` never gives an empty text
    ids = torch.cat([torch.from_numpy(x) for x in sequences.ids])
    return SampledVectors(layout, stored, ids, tuple(lengths), units)


def layout_of(stored: dict[int, tuple[Tensor, Tensor]], rotations: dict[int, Rotation], *, mla: bool) -> Layout:
    """Return the layout of vectors: layer by layer, the heads of slot 0, then of slot 1; rotated slots before rotation.

    Args:
        stored: layer → tensors of both slots [batch, heads, seq, dim].
        rotations: rotation of the keys by layer.
        mla: whether slot 1 is the rotary key of MLA.

    Raises:
        UnsupportedArchitectureError: a slot has a dimension of 0, as in MLA without a rotary key.
    """
    if empty := [layer_idx for layer_idx, slots in sorted(stored.items()) if 0 in (slots[0].shape[3], slots[1].shape[3])]:
        raise UnsupportedArchitectureError(
            f"Layers {empty} cache vectors of dimension 0, as MLA without a rotary key does. No codec supports such a cache."
        )
    parts = [
        Part(layer_idx, slot, (0, slots[slot].shape[1]), slots[slot].shape[3])
        for layer_idx, slots in sorted(stored.items())
        for slot in (0, 1)
    ]
    return Layout(tuple(parts), rotated_slots({i: r for i, r in rotations.items() if i in stored}, mla=mla))


def rotated_slots(rotations: dict[int, Rotation], *, mla: bool) -> dict[int, tuple[int, Rotation]]:
    """Return layer → the slot that the model rotates, and its rotation; with MLA the rotary key, else the keys."""
    return {i: (int(mla), rotation) for i, rotation in rotations.items()}


def tensor_names(layout: Layout, *, mla: bool) -> list[str]:
    """Return the tensor name of every part, as metrics use it: the kind, with its frame if it is rotated."""
    names = []
    for part in layout.parts:
        kind = (("latent", "key_rope") if mla else ("keys", "values"))[part.slot]
        before = layout.rotations.get(part.layer_idx, (None,))[0] == part.slot
        names.append(f"{kind}_pre_rope" if before else kind)
    return names


def affordable(session: Session, sequences: Sequences) -> Sequences:
    """Return all sequences, or as many, evenly spaced over the text, as have vectors that fit in the session's memory.

    Raises:
        StatisticsError: not even one sequence fits.
    """
    budget = session.memory // (2 * session.loaded.geometry.values_per_token)
    if budget < max(map(len, sequences.ids)):
        raise StatisticsError(
            f"{session.loaded.name} caches {session.loaded.geometry.values_per_token:,} numbers per token, so a `memory` of "
            f"{session.memory / 2**30:.1f} GiB holds only {budget} tokens. Raise `memory` or lower `max_length`."
        )
    step = -(-sum(map(len, sequences.ids)) // budget)
    return sequences if step == 1 else replace(sequences, ids=sequences.ids[::step])


def _check_finite(stored: dict[int, tuple[Tensor, Tensor]]) -> None:
    for layer_idx, slots in stored.items():
        for slot, x in zip(("keys", "values"), slots, strict=True):
            if not x.isfinite().all():
                raise NonFiniteError(f"layer {layer_idx} stores NaN or infinite {slot}. Try `dtype` float32.")
