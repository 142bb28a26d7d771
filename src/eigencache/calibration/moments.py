"""Capture the moments of a text in one pass; the probe and all PCA codecs are computed from them."""

from collections.abc import Collection, Iterable
from dataclasses import dataclass

import torch

from eigencache.calibration.accumulator import SAMPLED, WIDEST, Accumulator, Columns, shapes_of
from eigencache.calibration.pass_memory import beside_a_pass
from eigencache.calibration.session import Session
from eigencache.corpora.sequences import Sequences
from eigencache.errors import NonFiniteError
from eigencache.geometry import KINDS, kind_and_frame
from eigencache.memory import release
from eigencache.models.capture import Capture, CapturedLayer
from eigencache.records.base import Scope
from eigencache.records.provenance import Stopwatch


@dataclass(frozen=True, eq=False)
class CapturedMoments:
    """The moments of a text, and how they were captured.

    Args:
        sequences: the text.
        accumulator: the moments.
        columns: tensor name → columns of its layers.
        style: how the cached tensors were captured.
        notes: remarks of the capture.
        watch: stopwatch that was started before the text was read.
    """

    sequences: Sequences
    accumulator: Accumulator
    columns: dict[str, list[Columns]]
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
    widest: int = WIDEST,
    sampled: int = SAMPLED,
) -> CapturedMoments:
    """Capture a text and return its moments. Progress is reported as "capturing" after each batch.

    Args:
        session: the model and how it is run; `memory` limits the moments and a pass together.
        sequences: the text.
        scopes: scopes of the moments.
        layers: layers to capture; by default all that have a cache.
        kinds: kinds of tensors to keep.
        widest: most dimensions of a matrix of moments at scope `all`.
        sampled: about how many vectors of all layers to keep, where they are too wide for a matrix of moments.

    Raises:
        LayerError: a layer does not exist or has no cache.
        NonFiniteError: NaN or infinite values were captured.
        NoCacheError: the model has no cache.
        TokenizerMismatchError: the model does not embed all token ids.
        ModelError: the sequences are longer than the positions of the model.
        StatisticsError: a pass or the moments exceed `memory`.
    """
    watch = Stopwatch()
    left = beside_a_pass(session, sequences)
    session.require_readable(sequences)
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
                accumulator = Accumulator(
                    columns,
                    scopes,
                    sequences=len(sequences.ids),
                    tokens=sum(map(len, sequences.ids)),
                    budget=left,
                    widest=widest,
                    sampled=sampled,
                )
            accumulator.add(tensors, indices, lengths)
            del captured, tensors
            release()
            done += len(indices)
            session.on_progress("capturing", done, len(sequences.ids))
        assert accumulator is not None  # `pack` never gives an empty text
        return CapturedMoments(sequences, accumulator, columns, capture.style, list(capture.notes), watch)


def check_finite(captured: Iterable[CapturedLayer]) -> None:
    """Raise `NonFiniteError` if a layer holds NaN or infinite values; the message names the first layer and head."""
    for layer in captured:
        for name, tensor in layer.tensors.items():
            if not torch.stack(torch.aminmax(tensor)).isfinite().all():
                head = int((~tensor.isfinite()).any(-1).any(-1).any(0).nonzero()[0])
                raise NonFiniteError(
                    f"{name}: layer {layer.layer_idx}, head {head} holds NaN or infinite values. Try `dtype` float32."
                )


def captured_by_name(captured: Iterable[CapturedLayer]) -> dict[str, dict[int, torch.Tensor]]:
    """Return tensor name → layer → tensor, keys first, in the frame before rotation first."""
    tensors: dict[str, dict[int, torch.Tensor]] = {}
    for layer in captured:
        for name, tensor in layer.tensors.items():
            tensors.setdefault(name, {})[layer.layer_idx] = tensor

    def place(name: str) -> tuple[int, bool]:
        kind, frame = kind_and_frame(name)
        return KINDS.index(kind), frame == "post_rope"

    return {name: tensors[name] for name in sorted(tensors, key=place)}
