"""What a model caches of a text as plain vectors, one per token: keys before rotation and values of all layers in one row.

The vectors are brought into their frame by the same code that a codec encodes with.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from eigencache.calibration.moments import Progress, check_fit, silent
from eigencache.codec.eigen.position_means import PositionMeans
from eigencache.codec.layout import Layout, Part
from eigencache.corpora.sequences import Sequences
from eigencache.errors import NonFiniteError, StatisticsError, UnsupportedArchitectureError
from eigencache.models.load import LoadedModel
from eigencache.models.tapped_cache import tapped_cache
from eigencache.spectral.rope import Rotation


@dataclass(frozen=True, eq=False)
class SampledVectors:
    """`vectors` [n, width] float32 of the tokens `ids` [n], sequences of `lengths` one after the other."""

    layout: Layout
    vectors: Tensor
    ids: Tensor
    lengths: tuple[int, ...]

    @property
    def positions(self) -> Tensor:
        """Of every token in its sequence [n]."""
        return torch.cat([torch.arange(length) for length in self.lengths])

    @property
    def mean(self) -> Tensor:
        """[width] float32."""
        return self.vectors.mean(0, dtype=torch.float64).float()

    def without_first(self, count: int) -> "SampledVectors":
        """The same without the first `count` tokens of every sequence. Raises `StatisticsError` where none has more."""
        if not count:
            return self
        kept = self.positions >= count
        lengths = tuple(length - count for length in self.lengths if length > count)
        if not lengths:
            raise StatisticsError(f"no sequence is longer than {count} sinks: keep fewer `sinks` or raise `max_length`")
        return replace(self, vectors=self.vectors[kept], ids=self.ids[kept], lengths=lengths)

    def less_mean(self, mean: Tensor) -> "SampledVectors":
        """The same about `mean` [width]."""
        return replace(self, vectors=self.vectors - mean)

    def less_positions(self, means: PositionMeans | None) -> "SampledVectors":
        """The same without what positions add. They are those of whole sequences: nothing is left out of these yet."""
        if means is None:
            return self
        vectors = self.vectors.clone()
        for part in vectors.split(list(self.lengths)):
            part.sub_(means.at(torch.arange(len(part))))
        return replace(self, vectors=vectors)


@torch.no_grad()
def sample_vectors(
    loaded: LoadedModel,
    sequences: Sequences,
    rotations: dict[int, Rotation],
    *,
    memory: int,
    batch_size: int = 8,
    what: str = "vectors",
    on_progress: Progress = silent,
) -> SampledVectors:
    """Vectors of all sequences, or of as many from all over the text as `memory` bytes hold.

    Raises `NonFiniteError` naming layer and slot, `StatisticsError` where not even one sequence fits.
    """
    check_fit(loaded, sequences.corpus.max_length, max(int(ids.max()) for ids in sequences.ids))
    sequences = _affordable(loaded, sequences, memory)
    layout, rows, ids, lengths = None, [], [], []
    for input_ids, mask, _ in sequences.batches(batch_size, pad_id=0):
        cache, stored = tapped_cache(loaded.model)
        loaded.model.base_model(input_ids=input_ids.to(loaded.device), past_key_values=cache, use_cache=True)
        _check_finite(stored)
        layout = layout or layout_of(stored, rotations, mla=loaded.geometry.mla is not None)
        vectors = layout.vectors(stored, 0).cpu()
        for row, length in enumerate(mask.sum(-1).tolist()):
            rows.append(vectors[row, :length])
            ids.append(input_ids[row, :length])
            lengths.append(length)
        on_progress(what, len(lengths), len(sequences.ids))
    assert layout is not None  # `pack` never gives an empty text
    return SampledVectors(layout, torch.cat(rows), torch.cat(ids), tuple(lengths))


def layout_of(stored: dict[int, tuple[Tensor, Tensor]], rotations: dict[int, Rotation], *, mla: bool) -> Layout:
    """All heads of the first slot of every layer, then all of the second; rotated ones before rotation.

    Raises `UnsupportedArchitectureError` where a slot has no numbers, as in MLA without a rotary key.
    """
    if empty := [layer_idx for layer_idx, both in sorted(stored.items()) if 0 in (both[0].shape[3], both[1].shape[3])]:
        raise UnsupportedArchitectureError(
            f"layers {empty} cache vectors of 0 numbers, as MLA without a rotary key does: such a cache has no codec yet"
        )
    parts = [
        Part(layer_idx, slot, (0, both[slot].shape[1]), both[slot].shape[3])
        for slot in (0, 1)
        for layer_idx, both in sorted(stored.items())
    ]
    return Layout(tuple(parts), {i: (int(mla), rotation) for i, rotation in rotations.items() if i in stored})


def tensor_names(layout: Layout, *, mla: bool) -> list[str]:
    """The name of every part as metrics have it: its kind, and its frame where it has several."""
    names = []
    for part in layout.parts:
        kind = (("latent", "key_rope") if mla else ("keys", "values"))[part.slot]
        before = layout.rotations.get(part.layer_idx, (None,))[0] == part.slot
        names.append(f"{kind}_pre_rope" if before else kind)
    return names


def _affordable(loaded: LoadedModel, sequences: Sequences, memory: int) -> Sequences:
    budget = memory // (4 * loaded.geometry.values_per_token)
    if budget < max(map(len, sequences.ids)):
        raise StatisticsError(
            f"{loaded.name} caches {loaded.geometry.values_per_token:,} numbers per token: {memory / 2**30:.1f} GiB hold "
            f"{budget} tokens; raise the memory or shorten the sequences"
        )
    step = -(-sum(map(len, sequences.ids)) // budget)
    return sequences if step == 1 else replace(sequences, ids=sequences.ids[::step])


def _check_finite(stored: dict[int, tuple[Tensor, Tensor]]) -> None:
    for layer_idx, both in stored.items():
        for slot, x in zip(("keys", "values"), both, strict=True):
            if not x.isfinite().all():
                raise NonFiniteError(f"layer {layer_idx} stores NaN or infinite {slot}: try `dtype` float32")
