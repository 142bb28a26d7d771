"""Records of residual adapters: their training, the resulting operators, and the loss of truncating them.

An adapter computes x_eff = M x with M = I + s·W_out W_in. The energy of M is a share of its squared singular values; the
energy of keys and values is a share of their variance. They are different quantities with fields of their own.
"""

from typing import Literal

from eigencache.records.base import Record, StoredRecord
from eigencache.records.quality import Quality, ReadingProtocol
from eigencache.records.run import Corpus, Model, Run

LossName = Literal["nll", "nll+tail", "nll@rank"]
Method = Literal["operator-svd", "operator-svd-centered", "random-basis", "adapted-pca", "direct-pca"]


class Training(Record):
    """The training of the adapters; losses are means per token in the unit of `loss`."""

    loss: LossName
    loss_rank: int | None  # r of `nll+tail` and `nll@rank`
    tail_weight: float | None  # of `nll+tail`, nats
    inner_rank: int
    scale: float  # s
    steps: int
    learning_rate: float
    parameters: int  # trained
    losses: list[float]  # by step, on the batch of the step
    loss_before: float  # on the first sequences of the training text
    loss_after: float  # on the same sequences

    @property
    def warnings(self) -> list[str]:
        """A warning if training did not lower the loss."""
        if not self.steps or self.loss_after < self.loss_before:
            return []
        return [
            f"training did not lower its loss ({self.loss_before:.4f} before, {self.loss_after:.4f} after): "
            "lower `learning_rate`, or raise `steps`"
        ]


class Operator(Record):
    """M [p, p] of one layer after training, and the variance of the vectors before and after it."""

    layer_idx: int
    width: int  # p
    singular_values: list[float]  # gains, descending
    unit_gains: int  # gains equal to 1 up to rounding: at least p − 2 · inner rank for any training
    condition_number: float
    energy: dict[int, float]  # r → share of Σσ² in the r largest; r/p for the identity
    effective_rank: float  # exp of the entropy of the singular values (Roy & Vetterli 2007)
    distance: float  # ‖M − I‖_F / ‖I‖_F
    variance_energy: dict[int, float]  # r → share of the frozen model's variance in its own top r directions
    variance_kept: dict[int, float]  # r → share of the adapted vectors' variance in M's top r left singular vectors


class Truncation(Record):
    """Loss of a cache of r coefficients per layer; ΔNLL is above the same model with its uncompressed cache."""

    method: Method
    rank: int
    quality: Quality


class AdapterRecord(StoredRecord):
    """Residual adapters of one model: training, operators, and truncation measured through the cache."""

    schema_version: Literal["eigencache.adapter/1"] = "eigencache.adapter/1"
    model: Model
    corpus: Corpus  # scored
    calibration: Corpus  # of training and of all bases
    protocol: ReadingProtocol
    run: Run
    target: Literal["v", "k"]  # k: before rotation
    training: Training
    operators: list[Operator]
    frozen_nll: float  # nats per token, uncompressed cache, no adapter
    adapted_nll: float  # nats per token, uncompressed cache, with the adapters
    results: list[Truncation]
    warnings: list[str]

    def of(self, method: Method) -> list[Truncation]:
        """Return the results of one method, by ascending rank."""
        return sorted((r for r in self.results if r.method == method), key=lambda r: r.rank)
