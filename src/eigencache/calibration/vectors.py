"""Sample cached vectors of a text, one per token: keys before rotation and values of all layers, concatenated.

A codec encodes with the same code that brings these vectors into their layout.
"""

from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor

from eigencache.calibration.moments import check_fit
from eigencache.calibration.session import Session
from eigencache.codec.eigen.position_means import PositionMeans
from eigencache.codec.layout import Layout, Part
from eigencache.corpora.sequences import Sequences
from eigencache.errors import NonFiniteError, StatisticsError, UnsupportedArchitectureError
from eigencache.memory import release
from eigencache.models.tapped_cache import tapped_cache
from eigencache.spectral.rope import Rotation


@dataclass(frozen=True, eq=False)
class SampledVectors:
    """Cached vectors of the tokens of several sequences.

    Args:
        layout: heads and layers of the columns.
        vectors: one row per token [n, width] float32, sequence after sequence.
        ids: token ids [n].
        lengths: tokens of each sequence.
    """

    layout: Layout
    vectors: Tensor
    ids: Tensor
    lengths: tuple[int, ...]

    @property
    def positions(self) -> Tensor:
        """Position of every token in its sequence [n]."""
        return torch.cat([torch.arange(length) for length in self.lengths])

    @property
    def mean(self) -> Tensor:
        """Mean vector [width] float32."""
        return self.vectors.mean(0, dtype=torch.float64).float()

    def sequences(self, first: int, stop: int) -> "SampledVectors":
        """Return the sequences first … stop − 1; their tensors are views of these."""
        edges = [0, *accumulate(self.lengths)]
        tokens = slice(edges[first], edges[stop])
        return replace(self, vectors=self.vectors[tokens], ids=self.ids[tokens], lengths=self.lengths[first:stop])

    def less_mean(self, mean: Tensor) -> "SampledVectors":
        """Return the samples with `mean` [width] subtracted."""
        return replace(self, vectors=self.vectors - mean)

    def less_positions(self, means: PositionMeans | None) -> "SampledVectors":
        """Return the samples with the means by position subtracted. The sequences must be whole, first tokens included."""
        if means is None:
            return self
        vectors = self.vectors.clone()
        for part in vectors.split(list(self.lengths)):
            part.sub_(means.at(torch.arange(len(part))))
        return replace(self, vectors=vectors)


@torch.no_grad()
def sample_vectors(
    session: Session, sequences: Sequences, rotations: dict[int, Rotation], *, what: str = "vectors"
) -> SampledVectors:
    """Capture the vectors of all sequences, or of as many, evenly spaced over the text, as fit in memory.

    Args:
        session: the model and how it is run; `memory` limits the vectors.
        sequences: the text.
        rotations: rotation of the keys by layer.
        what: name of the work in progress reports.

    Raises:
        NonFiniteError: the model caches NaN or infinite values.
        StatisticsError: not even one sequence fits in memory.
    """
    check_fit(session.loaded, sequences.corpus.max_length, max(int(ids.max()) for ids in sequences.ids))
    sequences = _affordable(session, sequences)
    layout, vectors, lengths = None, torch.empty(0), [len(ids) for ids in sequences.ids]
    filled = 0
    for input_ids, _, indices in sequences.batches(session.batch_size, pad_id=0):
        cache, stored = tapped_cache(session.loaded.model)
        session.loaded.model.base_model(input_ids=input_ids.to(session.loaded.device), past_key_values=cache, use_cache=True)
        _check_finite(stored)
        if layout is None:
            layout = layout_of(stored, rotations, mla=session.loaded.geometry.mla is not None)
            vectors = torch.empty(sum(lengths), layout.width)  # filled in place: a concatenation would hold it twice
        batch = layout.vectors(stored, 0)
        for row, index in enumerate(indices):
            vectors[filled : filled + lengths[index]] = batch[row, : lengths[index]]
            filled += lengths[index]
        del cache, stored, batch
        release()
        session.on_progress(what, indices[-1] + 1, len(lengths))
    assert layout is not None  # `pack` never gives an empty text
    ids = torch.cat([torch.from_numpy(x) for x in sequences.ids])
    return SampledVectors(layout, vectors, ids, tuple(lengths))


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
    return Layout(tuple(parts), {i: (int(mla), rotation) for i, rotation in rotations.items() if i in stored})


def tensor_names(layout: Layout, *, mla: bool) -> list[str]:
    """Return the tensor name of every part, as metrics use it: the kind, with its frame if it is rotated."""
    names = []
    for part in layout.parts:
        kind = (("latent", "key_rope") if mla else ("keys", "values"))[part.slot]
        before = layout.rotations.get(part.layer_idx, (None,))[0] == part.slot
        names.append(f"{kind}_pre_rope" if before else kind)
    return names


def _affordable(session: Session, sequences: Sequences) -> Sequences:
    budget = session.memory // (4 * session.loaded.geometry.values_per_token)
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
