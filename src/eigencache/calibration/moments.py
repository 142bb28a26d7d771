"""A text is read once: what a model caches of it as moments, from which the probe and every codec are made."""

from collections.abc import Collection, Iterable
from dataclasses import dataclass

import torch

from eigencache.calibration.accumulator import Accumulator, Columns, shapes_of
from eigencache.calibration.session import Session
from eigencache.corpora.sequences import Sequences
from eigencache.errors import ModelError, NonFiniteError, TokenizerMismatchError
from eigencache.geometry import KINDS, kind_and_frame
from eigencache.models.capture import Capture, CapturedLayer
from eigencache.models.load import LoadedModel
from eigencache.records.base import Scope
from eigencache.records.provenance import Stopwatch


@dataclass(frozen=True, eq=False)
class CapturedMoments:
    """The moments of a text, which tensors they are of, and how those were captured; `watch` began before it was read."""

    sequences: Sequences
    accumulator: Accumulator
    columns: dict[str, list[Columns]]  # tensor name → its layers
    style: str
    notes: list[str]
    watch: Stopwatch


def gather(
    session: Session,
    sequences: Sequences,
    scopes: tuple[Scope, ...],
    *,
    layers: tuple[int, ...] | None = None,
    kinds: Collection[str] = KINDS,
) -> CapturedMoments:
    """Capture every batch and add it to moments; `on_progress("capturing", done, of)` after each.

    Raises `LayerError`, `NonFiniteError`, `NoCacheError`, `TokenizerMismatchError`, `ModelError` (more positions asked
    than the model has), `StatisticsError` (memory).
    """
    watch = Stopwatch()
    check_fit(session.loaded, sequences.corpus.max_length, max(int(ids.max()) for ids in sequences.ids))
    accumulator, columns, done = None, {}, 0
    with Capture(session.loaded.model, session.loaded.geometry, layers=layers) as capture:
        for input_ids, attention_mask, indices in sequences.batches(session.batch_size, pad_id=0):
            lengths = attention_mask.sum(-1).tolist()
            padded = min(lengths) < input_ids.shape[1]
            with watch:
                captured = capture.run(
                    input_ids.to(session.loaded.device), attention_mask.to(session.loaded.device) if padded else None
                )
            check_finite(captured)
            tensors = {n: t for n, t in captured_by_name(captured).items() if kind_and_frame(n)[0] in kinds}
            if accumulator is None:
                columns = shapes_of(tensors)
                accumulator = Accumulator(columns, scopes, sequences=len(sequences.ids), budget=session.memory)
            accumulator.add(tensors, indices, lengths)
            done += len(indices)
            session.on_progress("capturing", done, len(sequences.ids))
        assert accumulator is not None  # `pack` never gives an empty text
        return CapturedMoments(sequences, accumulator, columns, capture.style, list(capture.notes), watch)


def check_fit(loaded: LoadedModel, max_length: int, largest_id: int) -> None:
    """Raises when sequences are longer than the model's learned positions, or ids larger than its vocabulary."""
    rows = loaded.embedded_ids
    if largest_id >= rows:
        raise TokenizerMismatchError(
            f"{loaded.name}: the tokenizer gave id {largest_id}, the model embeds only {rows}: they do not belong together"
        )
    positions = loaded.learned_positions
    if positions and max_length > positions:
        raise ModelError(
            f"{loaded.name} has {positions} positions, sequences have {max_length}: use `max_length` {positions}"
        )


def check_finite(captured: Iterable[CapturedLayer]) -> None:
    """Raises `NonFiniteError` with the first layer, and the head in it, that holds NaN or infinite values."""
    for layer in captured:
        for name, tensor in layer.tensors.items():
            if not torch.stack(torch.aminmax(tensor)).isfinite().all():
                head = int((~tensor.isfinite()).any(-1).any(-1).any(0).nonzero()[0])
                raise NonFiniteError(
                    f"{name}: layer {layer.layer_idx}, head {head} holds NaN or infinite values: try `dtype` float32"
                )


def captured_by_name(captured: Iterable[CapturedLayer]) -> dict[str, dict[int, torch.Tensor]]:
    """Tensor name → layer → tensor; keys first, before rotation first."""
    tensors: dict[str, dict[int, torch.Tensor]] = {}
    for layer in captured:
        for name, tensor in layer.tensors.items():
            tensors.setdefault(name, {})[layer.layer_idx] = tensor

    def place(name: str) -> tuple[int, bool]:
        kind, frame = kind_and_frame(name)
        return KINDS.index(kind), frame == "post_rope"

    return {name: tensors[name] for name in sorted(tensors, key=place)}
