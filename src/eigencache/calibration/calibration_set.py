"""A calibration set: sampled vectors, metrics and held-out sequences of a text, from which codecs are fitted."""

from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
from torch import Tensor

from eigencache.calibration.fisher_metric import measure_fisher
from eigencache.calibration.gradient_energy import GradientEnergy
from eigencache.calibration.kept_measurements import (
    KeptMeasurements,
    metric_of,
    tensors_of_metric,
    tensors_of_vectors,
    vectors_of,
)
from eigencache.calibration.metrics import FROBENIUS, METRIC_TOKENS, Metrics, check_metric, metric_named, spread_out
from eigencache.calibration.session import Session
from eigencache.calibration.vectors import SampledVectors, affordable, rotated_slots, sample_vectors, tensor_names
from eigencache.codec.sinks_and_window import FIRST_EXACT
from eigencache.corpora.sequences import Sequences
from eigencache.errors import StatisticsError
from eigencache.models.load import LoadedModel
from eigencache.models.rope_detection import rotations_of, steady_tokens
from eigencache.spectral.rope import Rotation

HELD_OUT_SHARE = 8  # one sequence of this many is held out


def calibration_length(loaded: LoadedModel) -> int:
    """Return the sequence length to fit on: 512, or all learned positions of a model, because its codec stores their means.

    It is shorter where the model would rotate the keys of a longer text differently.
    """
    length = loaded.learned_positions or loaded.default_length
    return min(length, steady_tokens(loaded.model.config) or length)


@dataclass(eq=False)
class CalibrationSet:
    """One model on one calibration text; every part is measured on first use, once for any number of fits.

    The last eighth of the text is held out: nothing is fitted on it.

    Args:
        session: the model and how it is run.
        sequences: the calibration text.
        most_vectors: largest number of tokens whose vectors are sampled, held-out ones included, in sequences evenly spaced
            over the text; None: no limit but the session's memory.
        metrics: the metrics measured so far, by name. A `replace` of the set shares them.
        gradients: the gradient energy measured with the metric of a name.
        metric_tokens: tokens of the text that a metric is measured on.
        kept: where measurements of an interrupted fit are found, and new ones are kept.

    Raises:
        StatisticsError: fewer than 16 sequences, or sequences whose keys the model rotates differently.
    """

    session: Session
    sequences: Sequences
    most_vectors: int | None = None
    metrics: dict[str, Metrics] = field(default_factory=dict)
    gradients: dict[str, GradientEnergy] = field(default_factory=dict)
    metric_tokens: int = METRIC_TOKENS
    kept: KeptMeasurements = field(default_factory=KeptMeasurements)

    def __post_init__(self) -> None:
        self.session.require_steady(self.sequences)
        if len(self.sequences.ids) < 2 * HELD_OUT_SHARE:
            raise StatisticsError(
                f"{len(self.sequences.ids)} sequences are too few: {2 * HELD_OUT_SHARE} are needed to fit and to hold out. "
                "Calibrate on more tokens or on shorter sequences."
            )

    @property
    def fitted_on(self) -> Sequences:
        """All but the last eighth of the text. Held-out sequences from within it would share documents with these."""
        return replace(self.sequences, ids=self.sequences.ids[: self._edge])

    @property
    def held_out(self) -> Sequences:
        """The last eighth of the text, on which nothing is fitted."""
        return replace(self.sequences, ids=self.sequences.ids[self._edge :])

    @cached_property
    def rotations(self) -> dict[int, Rotation]:
        """The rotation of the keys, by layer."""
        return rotations_of(self.session.loaded)

    @cached_property
    def samples(self) -> SampledVectors:
        """The vectors that everything is fitted on."""
        return self._sampled(self.fitted_on, "vectors")

    @cached_property
    def held_out_samples(self) -> SampledVectors:
        """The vectors of the held-out sequences."""
        return self._sampled(self.held_out, "held-out vectors")

    def metric(self, name: str) -> list[Tensor]:
        """Return the matrices [heads, dim, dim] of a metric, one tensor per part of a vector; none for `frobenius`.

        A metric without a common scale is scaled to the trace of the Fisher metric (THEORY 4).
        """
        if check_metric(name) == FROBENIUS:
            return []
        measured = self._measured(name)  # before the vectors are sampled, so that memory holds one or the other
        layout = self.samples.layout
        names = tensor_names(layout, mla=self.session.loaded.geometry.mla is not None)
        blocks = [measured[kind][part.layer_idx] for kind, part in zip(names, layout.parts, strict=True)]
        if not metric_named(name).common_scale:
            pairs = zip(blocks, self.metric("fisher"), strict=True)
            blocks = [b * (_trace(f) / _trace(b).clamp_min(1e-300))[:, None, None] for b, f in pairs]
        return blocks

    @property
    def sinks(self) -> int:
        """First tokens to store exactly: 4, or more where the gradients of the Fisher metric show more attention sinks.

        It is 4 for a set that was given its Fisher metric without gradients.
        """
        self._measured("fisher")
        return self.gradients["fisher"].sinks if "fisher" in self.gradients else FIRST_EXACT

    def _measured(self, name: str) -> Metrics:
        if name not in self.metrics:
            energy, what = None, f"{name} metric"
            if (found := self.kept.find(what)) is not None:
                self._resumed(what)
                self.metrics[name], energy = metric_of(found)
            else:
                text = spread_out(self.fitted_on, self.metric_tokens)
                if name == "fisher":  # its backward passes give the gradient energy as well
                    self.metrics[name], energy = measure_fisher(self.session, text, self.rotations)
                else:
                    self.metrics[name] = metric_named(name).measure(self.session, text, self.rotations)
                self.kept.keep(what, tensors_of_metric(self.metrics[name], energy))
            if energy is not None:
                self.gradients[name] = energy
        return self.metrics[name]

    @property
    def _edge(self) -> int:
        return len(self.sequences.ids) - len(self.sequences.ids) // HELD_OUT_SHARE

    def _sampled(self, sequences: Sequences, what: str) -> SampledVectors:
        session = replace(self.session, memory=self.session.memory // 2)
        step = 1 if self.most_vectors is None else -(-sum(map(len, self.sequences.ids)) // self.most_vectors)
        sampled = affordable(session, replace(sequences, ids=sequences.ids[::step]))
        found = self.kept.find(what)
        if found is not None and np.array_equal(found["ids"].numpy(), np.concatenate(sampled.ids)):
            self._resumed(what)
            return vectors_of(found, rotated_slots(self.rotations, mla=self.session.loaded.geometry.mla is not None))
        samples = sample_vectors(session, sampled, self.rotations, what=what)
        self.kept.keep(what, tensors_of_vectors(samples))
        return samples

    def _resumed(self, what: str) -> None:
        self.session.on_progress(f"{what}, kept by an interrupted fit", 1, 1)


def _trace(blocks: Tensor) -> Tensor:
    return blocks.diagonal(dim1=-2, dim2=-1).sum(-1)
