"""What `eigen` is fitted from, gathered once for any number of fits: vectors, metrics, and sequences that are kept apart."""

from dataclasses import dataclass, replace
from functools import cached_property, partial

from torch import Tensor

from eigencache.calibration.attention_metric import attention_metrics
from eigencache.calibration.fisher_metric import Metrics, fisher_metrics
from eigencache.calibration.metrics import MetricName, spread_out
from eigencache.calibration.moments import MEMORY, Progress, silent
from eigencache.calibration.vectors import SampledVectors, sample_vectors, tensor_names
from eigencache.corpora.sequences import Sequences
from eigencache.errors import StatisticsError
from eigencache.models.load import LoadedModel
from eigencache.models.rope_detection import require_steady, rotations_of, steady_tokens
from eigencache.spectral.rope import Rotation

APART = 8  # the last of so many parts of the text is kept apart
METRIC_TOKENS = 32_768


def calibration_length(loaded: LoadedModel) -> int:
    """Tokens of a sequence to fit on: 512, or every position that a model has learned; it stores them with the rest.

    Fewer where a longer text is rotated otherwise.
    """
    length = loaded.learned_positions or loaded.default_length
    return min(length, steady_tokens(loaded.model.config) or length)


@dataclass(eq=False)
class CalibrationSet:
    """One model on one text; every part is measured when it is first asked for.

    Raises `StatisticsError` for fewer than 16 sequences, and for sequences at whose length the model's rotation changes.
    """

    loaded: LoadedModel
    sequences: Sequences
    memory: int = MEMORY
    batch_size: int = 8
    on_progress: Progress = silent

    def __post_init__(self) -> None:
        require_steady(self.loaded, max(map(len, self.sequences.ids), default=0))
        if len(self.sequences.ids) < 2 * APART:
            raise StatisticsError(
                f"{len(self.sequences.ids)} sequences: {2 * APART} are needed, some of them kept apart: raise `tokens` "
                "(of a bench `calibration_tokens`), or lower `max_length`"
            )

    @property
    def fitted_on(self) -> Sequences:
        """All but the last eighth of the text. Sequences from between them would flatter: they share documents."""
        return replace(self.sequences, ids=self.sequences.ids[: self._edge])

    @property
    def apart(self) -> Sequences:
        """The last eighth, on which nothing is fitted."""
        return replace(self.sequences, ids=self.sequences.ids[self._edge :])

    @cached_property
    def rotations(self) -> dict[int, Rotation]:
        """Layer → how its keys are rotated."""
        return rotations_of(self.loaded)

    @cached_property
    def samples(self) -> SampledVectors:
        """Vectors that everything is fitted on."""
        return self._sampled(self.fitted_on, "vectors")

    @cached_property
    def held(self) -> SampledVectors:
        """Vectors of the sequences kept apart."""
        return self._sampled(self.apart, "vectors kept apart")

    def metric(self, name: MetricName) -> list[Tensor]:
        """Blocks [heads, dim, dim] per part of a vector; none for Frobenius. That of attention is scaled by Fisher's trace.

        By itself it has no common scale across layers or between keys and values (THEORY 4).
        """
        if name == "frobenius":
            return []
        layout = self.samples.layout
        names = tensor_names(layout, mla=self.loaded.geometry.mla is not None)
        found = self._attention if name == "attention" else self._fisher
        blocks = [found[kind][part.layer_idx] for kind, part in zip(names, layout.parts, strict=True)]
        if name == "attention":
            pairs = zip(blocks, self.metric("fisher"), strict=True)
            blocks = [b * (_trace(f) / _trace(b).clamp_min(1e-300))[:, None, None] for b, f in pairs]
        return blocks

    @cached_property
    def _fisher(self) -> Metrics:
        return fisher_metrics(*self._measured, on_batch=partial(self.on_progress, "fisher metric"))

    @cached_property
    def _attention(self) -> Metrics:
        return attention_metrics(*self._measured, on_batch=partial(self.on_progress, "attention metric"))

    @property
    def _measured(self) -> tuple[LoadedModel, Sequences, dict[int, Rotation]]:
        return self.loaded, spread_out(self.fitted_on, METRIC_TOKENS), self.rotations

    @property
    def _edge(self) -> int:
        return len(self.sequences.ids) - len(self.sequences.ids) // APART

    def _sampled(self, sequences: Sequences, what: str) -> SampledVectors:
        return sample_vectors(
            self.loaded,
            sequences,
            self.rotations,
            memory=self.memory // 2,
            batch_size=self.batch_size,
            what=what,
            on_progress=self.on_progress,
        )


def _trace(blocks: Tensor) -> Tensor:
    return blocks.diagonal(dim1=-2, dim2=-1).sum(-1)
