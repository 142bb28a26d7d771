"""Records of recommendations: what compresses a cache within a loss budget, by use, the evidence, and the limitations.

A setting is chosen by the upper end of its interval on one part of the text; its loss is stated on a held-out part. The
families are `eigen` for caches that are stored, `live` for the cache that a model generates with, and PCA for research.
"""

import math
from typing import Literal, Self, get_args

from pydantic import Field

from eigencache.errors import BudgetError
from eigencache.records.base import Centered, Record, StoredRecord
from eigencache.records.probe import ProbeRecord
from eigencache.records.quality import LedgerRow, Quality, ReadingProtocol, SweepPoint, SweepRecord, SweepSeries
from eigencache.records.run import Corpus, Model, Run

DEFAULT_PPL = "1%"
WORDS = {"k": "K", "v": "V", "kv": "K and V", "latent": "the latent", "key_rope": "the rotary key"}
Family = Literal["pca", "eigen", "live"]
CodecFamily = Literal["eigen", "live"]
FAMILIES: tuple[Family, ...] = get_args(Family)
_FRAMES = {"pre": " before rotation", "post": " after rotation", "none": ""}
_SCOPES = {"head": "one basis per head", "layer": "one basis per layer", "all": "one basis for all layers"}


class Budget(Record):
    """The allowed loss."""

    nats: float  # per token
    given: str  # as the user gave it

    @classmethod
    def of_nll(cls, text: str) -> Self:
        """Read a budget in nats per token, such as `0.01`.

        Raises:
            BudgetError: `text` is not a finite number of at least 0.
        """
        given = f"`budget_nll` {text}"
        nats = _number(text, f"{given}: give nats per token, such as 0.01")
        if nats < 0:
            raise BudgetError(f"{given}: a budget must not be negative: give nats per token, such as 0.01")
        return cls(nats=nats, given=f"--budget-nll {text}")

    @classmethod
    def of_ppl(cls, text: str) -> Self:
        """Read a perplexity increase, such as `1%` or `0.01`: ΔNLL = ln(1 + increase).

        Raises:
            BudgetError: `text` is not a share of at least 0 and below 1.
        """
        message = f"`budget_ppl` {text}: give a perplexity increase of at least 0 and below 100 %, such as 1% or 0.01"
        percent = text.strip().endswith("%")
        share = _number(text.strip().removesuffix("%"), message) / (100 if percent else 1)
        if not 0 <= share < 1:
            raise BudgetError(message)
        return cls(nats=math.log1p(share), given=f"--budget-ppl {text}")


def _number(text: str, message: str) -> float:
    try:
        number = float(text)
    except ValueError as error:
        raise BudgetError(message) from error
    if not math.isfinite(number):
        raise BudgetError(message)
    return number


class Measured(Record):
    """A codec with its loss on the part for choosing and on the held-out part, and the command that makes it."""

    name: str
    choosing: Quality  # on the part that the choice used
    stating: Quality | None = None  # on the held-out part
    command: str = ""  # empty: no command makes it, or the record is of an earlier version

    @property
    def upper_nats(self) -> float:
        """Upper end of the interval on the part for choosing; infinite if there are too few sequences for an interval."""
        interval = self.choosing.delta_nll_interval
        return interval[1] if interval else math.inf

    @property
    def nbytes_per_token(self) -> float:
        """Bytes of the compressed cache per token, without the basis."""
        return self.choosing.encoded_nbytes / self.choosing.encoded_tokens

    @property
    def sixteen_bit_nbytes_per_token(self) -> float:
        """Bytes of the 16-bit cache per token."""
        return self.choosing.sixteen_bit_nbytes / self.choosing.encoded_tokens

    def holds(self, budget: Budget) -> bool | None:
        """Return whether the held-out interval is within the budget; None if there is no interval."""
        if self.stating is None or self.stating.delta_nll_interval is None:
            return None
        return self.stating.delta_nll_interval[1] <= budget.nats


class Candidate(Measured):
    """One PCA setting at one rank."""

    target: str
    scope: str
    frame: str  # of keys: `pre` or `post` rotation; `none` if no compressed tensor is rotated
    metric: str
    centered: Centered
    bits: int
    rank: int  # coefficients per head, layer or all layers, depending on the scope
    width: int  # full rank
    target_ratio: float  # bytes of the target in 16 bits / bytes of its coefficients

    @classmethod
    def of(cls, series: SweepSeries, point: SweepPoint, rotated: bool) -> Self:
        """Return the candidate of one point of a sweep.

        Args:
            series: The setting.
            point: One of its ranks.
            rotated: Whether the model rotates its keys.
        """
        fields = ("target", "scope", "metric", "centered", "bits", "width")
        return cls(
            name=point.quality.codec,
            frame=series.frame if rotated and series.target in ("k", "kv", "key_rope") else "none",
            rank=point.rank,
            target_ratio=point.target_ratio,
            choosing=point.quality,
            **{field: getattr(series, field) for field in fields},
        )

    def describe(self) -> str:
        """Return a phrase such as `K before rotation and V, one basis per head, metric fisher, rank 12 of 32 in 8 bits`."""
        frame = _FRAMES[self.frame]
        target = f"K{frame} and V" if self.target == "kv" and frame else WORDS[self.target] + frame
        centering = "" if self.centered else ", uncentered"
        rank = "full rank" if self.rank == self.width else f"rank {self.rank} of {self.width}"
        return f"{target}, {_SCOPES[self.scope]}, metric {self.metric}{centering}, {rank} in {self.bits} bits"

    @property
    def break_even_context(self) -> int | None:
        """Context length in tokens whose saved bytes equal the basis; None if nothing is saved."""
        saved = self.sixteen_bit_nbytes_per_token - self.nbytes_per_token
        return math.ceil(self.choosing.basis_nbytes / saved) if saved > 0 else None


class CodecCandidate(Measured):
    """A codec of one family at one rate."""

    family: CodecFamily
    rate: float  # bits per value of `eigen` at the context of `longer`, or bits per packed value of `live`
    longer: LedgerRow  # bytes of one sequence of 2,048 tokens: first tokens in 16 bits weigh less than in a short prefix
    break_even_context: int | None  # tokens; None if no sequence is long enough

    def describe(self) -> str:
        """Return a phrase such as `eigen, 0.5 bits per value` or `live, 2.5 bits per packed value`."""
        return f"{self.family}, {self.rate:g} bits per {'' if self.family == 'eigen' else 'packed '}value"


class CodecAdvice(Record):
    """The codecs of one family at all rates, and the smallest within the budget."""

    family: CodecFamily
    candidates: list[CodecCandidate]  # ascending rates
    chosen: CodecCandidate | None  # None: none is within the budget
    nearest: CodecCandidate | None  # if none is: the one with the lowest upper end
    calibration: Corpus | None  # None: nothing was fitted
    uncompressed_nll: float | None  # nats per token, on the part for choosing
    left_out: list[str]  # rates that were not measured, or the whole family, each with its reason


class Evidence(Record):
    """One line of evidence."""

    claim: str
    figure: str  # the number that supports the claim
    source: str  # of the number


class KeyBias(Record):
    """Size of the key bias of one layer, before rotation, heads concatenated."""

    layer_idx: int
    bias_norm: float
    mean_key_norm: float  # over tokens, with the bias
    largest_to_median: float  # magnitude of the channels of the bias; infinite if the median is zero

    @property
    def share(self) -> float:
        """Norm of the bias / mean norm of the keys."""
        return self.bias_norm / self.mean_key_norm


class KeyRounding(Record):
    """Loss of keys in fp8 or int8 and values in 16 bits."""

    kind: Literal["fp8", "int8"]
    mean_out: bool  # whether the mean is subtracted first
    quality: Quality


class Keys(Record):
    """Key biases of a model, and the loss of rounded keys."""

    biases: list[KeyBias]
    roundings: list[KeyRounding]


class Advice(StoredRecord):
    """What compresses a cache within a loss budget: a codec for each use, and the PCA setting `chosen`.

    Where `chosen` is None, no measured PCA setting meets the budget. Where `sweeps` is empty, PCA was not measured.
    """

    schema_version: Literal["eigencache.advice/1"] = "eigencache.advice/1"
    subject: str  # the model, or the file of a record
    model: Model
    budget: Budget
    protocol: ReadingProtocol
    calibration: Corpus
    choosing: Corpus
    stating: Corpus | None  # held-out part; None for a recommendation from a sweep, on the tokens of the choice
    uncompressed_nll: float  # nats per token, on the part for choosing
    chosen: Candidate | None
    others: list[Candidate]  # the best within the budget of every other target
    nearest: Candidate | None  # if no setting meets the budget: the one with the lowest upper end
    keys: Keys | None  # None: no key biases, or not measured
    codecs: list[CodecAdvice] = []  # of the families `eigen` and `live`; none in records of earlier versions
    pca_refusal: str = ""  # why PCA could not be measured
    evidence: list[Evidence]
    unknown: list[str]  # limitations
    sweeps: dict[str, SweepRecord]  # all measured points, by pass
    run: Run
    warnings: list[str]

    @property
    def holds(self) -> bool | None:
        """Whether the held-out interval of the chosen PCA setting is within the budget; None if there is no interval."""
        return self.chosen.holds(self.budget) if self.chosen else None


class Verdict(Record):
    """The verdict of a report on one model: a recommendation, or the reason why there is none."""

    advice: Advice | None = None
    reason: str = ""


class ReportRecord(StoredRecord):
    """The data of one report: the probes, and a verdict on each if compression was measured."""

    schema_version: Literal["eigencache.report/1"] = "eigencache.report/1"
    probes: list[ProbeRecord]
    verdicts: list[Verdict] = Field(default_factory=list)  # in the order of the probes
