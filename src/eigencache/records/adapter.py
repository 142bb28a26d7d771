"""Records of residual adapters: what was trained, which operators came out, and what their truncation costs.

An adapter makes x_eff = M x with M = I + s·W_out W_in. Energies of M are of squared gains; energies of values or keys
are of variance. The two stand beside each other and are never mixed.
"""

from typing import Literal

from eigencache.records.base import Record, StoredRecord
from eigencache.records.quality import Quality, ReadingProtocol
from eigencache.records.run import Corpus, Model, Run

LossName = Literal["nll", "nll+tail", "nll@rank"]
Method = Literal["operator-svd", "operator-svd-centered", "random-basis", "adapted-pca", "direct-pca"]


class Training(Record):
    """How the adapters were trained; losses are means per token in the unit of `loss`."""

    loss: LossName
    loss_rank: int | None  # r of nll+tail and nll@rank
    tail_weight: float | None  # of nll+tail, nats
    inner_rank: int
    scale: float  # s
    steps: int
    learning_rate: float
    parameters: int  # trained
    losses: list[float]  # of each step's own batch
    loss_before: float  # on the same first sequences of the training text
    loss_after: float

    @property
    def warnings(self) -> list[str]:
        """Says so where the loss did not go down."""
        if not self.steps or self.loss_after < self.loss_before:
            return []
        return [
            f"training did not lower its loss ({self.loss_before:.4f} before, {self.loss_after:.4f} after): "
            "lower `learning_rate`, or raise `steps`"
        ]


class Operator(Record):
    """One layer's M [p, p] after training, beside the variance of the vectors before it and behind it."""

    layer_idx: int
    width: int  # p
    singular_values: list[float]  # gains, descending
    unit_gains: int  # gains equal to 1 to rounding: at least p − 2 · inner rank, whatever was trained
    condition_number: float
    energy: dict[int, float]  # r → share of Σσ² in the r largest; r/p for the identity
    effective_rank: float  # exp of the entropy of the singular values (Roy & Vetterli 2007)
    distance: float  # ‖M − I‖_F / ‖I‖_F
    variance_energy: dict[int, float]  # r → share of the frozen model's variance in its own top r directions
    variance_kept: dict[int, float]  # r → share of the adapted vectors' variance in M's top r left singular vectors


class Truncation(Record):
    """What a cache of r coefficients per layer costs; ΔNLL is against the same model with its uncompressed cache."""

    method: Method
    rank: int
    quality: Quality


class AdapterRecord(StoredRecord):
    """Residual adapters of one model: training, operators, and truncation measured through the cache."""

    schema_version: Literal["eigencache.adapter/1"] = "eigencache.adapter/1"
    model: Model
    corpus: Corpus  # scored
    calibration: Corpus  # trained on, and behind every basis
    protocol: ReadingProtocol
    run: Run
    target: Literal["v", "k"]  # k: before rotation
    training: Training
    operators: list[Operator]
    frozen_nll: float  # nats per token, uncompressed cache, no adapter
    adapted_nll: float  # the same with the adapters
    results: list[Truncation]
    warnings: list[str]

    def of(self, method: Method) -> list[Truncation]:
        """The results of one method, by rank."""
        return sorted((r for r in self.results if r.method == method), key=lambda r: r.rank)
