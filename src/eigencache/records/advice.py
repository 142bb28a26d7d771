"""Records of advice: which way of compressing a cache to choose within a budget, the evidence, and what is not known.

A way is chosen by the upper end of its interval on one part of the text; its loss is stated on another part.
"""

import math
from typing import Literal, Self

from pydantic import Field

from eigencache.errors import BudgetError
from eigencache.records.base import Centered, Record, StoredRecord
from eigencache.records.probe import ProbeRecord
from eigencache.records.quality import Quality, ReadingProtocol, SweepPoint, SweepRecord, SweepSeries
from eigencache.records.run import Corpus, Model, Run

DEFAULT_PPL = "1%"
WORDS = {"k": "K", "v": "V", "kv": "K and V", "latent": "the latent", "key_rope": "the rotary key"}
_WHERE = {"pre": " before rotation", "post": " after rotation", "none": ""}
_OVER = {"head": "one basis per head", "layer": "one basis per layer", "all": "one basis for all layers"}


class Budget(Record):
    """The loss that is allowed, in nats per token, and how the user put it."""

    nats: float
    given: str

    @classmethod
    def of_nll(cls, text: str) -> Self:
        """`0.01` nats per token. Raises `BudgetError`."""
        what = f"`budget_nll` {text}"
        nats = _number(text, f"{what}: give nats per token, such as 0.01")
        if nats < 0:
            raise BudgetError(f"{what}: a budget below zero asks for a gain: give nats per token, such as 0.01")
        return cls(nats=nats, given=f"--budget-nll {text}")

    @classmethod
    def of_ppl(cls, text: str) -> Self:
        """`1%` or `0.01` of perplexity: ΔNLL = ln(1 + share). Raises `BudgetError`."""
        what = f"`budget_ppl` {text}"
        say = f"{what}: give a share of perplexity of at least 0 and below 100 %, such as 1% or 0.01"
        percent = text.strip().endswith("%")
        share = _number(text.strip().removesuffix("%"), say) / (100 if percent else 1)
        if not 0 <= share < 1:
            raise BudgetError(say)
        return cls(nats=math.log1p(share), given=f"--budget-ppl {text}")


def _number(text: str, say: str) -> float:
    try:
        number = float(text)
    except ValueError as error:
        raise BudgetError(say) from error
    if not math.isfinite(number):
        raise BudgetError(say)
    return number


class Candidate(Record):
    """One way of compressing at one rank: what it is, what it cost where it was chosen, and what elsewhere."""

    name: str
    target: str
    scope: str
    frame: str  # of keys: `pre` or `post` rotation; `none` where nothing that is compressed is rotated
    metric: str
    centered: Centered
    bits: int
    rank: int  # coefficients per group
    width: int  # full rank
    target_ratio: float
    choosing: Quality
    stating: Quality | None = None

    @classmethod
    def of(cls, series: SweepSeries, point: SweepPoint, rotated: bool) -> Self:
        """A point of a sweep; `rotated`: whether the model rotates its keys."""
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
        """`K before rotation and V, one basis per head, metric fisher, rank 12 of 32 in 8 bits`."""
        where = _WHERE[self.frame]
        what = f"K{where} and V" if self.target == "kv" and where else WORDS[self.target] + where
        about = "" if self.centered else ", about zero"
        rank = "full rank" if self.rank == self.width else f"rank {self.rank} of {self.width}"
        return f"{what}, {_OVER[self.scope]}, metric {self.metric}{about}, {rank} in {self.bits} bits"

    @property
    def upper_nats(self) -> float:
        """Upper end of the interval on the choosing part; infinite where there were too few sequences for one."""
        interval = self.choosing.delta_nll_interval
        return interval[1] if interval else math.inf

    @property
    def nbytes_per_token(self) -> float:
        """Bytes held per encoded token, of all the model caches, the basis apart."""
        return self.choosing.encoded_nbytes / self.choosing.encoded_tokens

    @property
    def sixteen_bit_nbytes_per_token(self) -> float:
        """Bytes of the same in 16 bits."""
        return self.choosing.sixteen_bit_nbytes / self.choosing.encoded_tokens

    @property
    def break_even_context(self) -> int | None:
        """Tokens of context from which the bytes saved exceed those of the basis; None where none are saved."""
        saved = self.sixteen_bit_nbytes_per_token - self.nbytes_per_token
        return math.ceil(self.choosing.basis_nbytes / saved) if saved > 0 else None


class Evidence(Record):
    """One line: a claim, the figure behind it, and where that comes from."""

    claim: str
    figure: str
    source: str


class KeyBias(Record):
    """How large the bias of one layer's keys is, before rotation, heads joined."""

    layer_idx: int
    bias_norm: float
    mean_key_norm: float  # over tokens, the bias included
    largest_to_median: float  # of the bias's channels, by magnitude; infinite where the median is zero

    @property
    def share(self) -> float:
        """Norm of the bias over the mean norm of the keys."""
        return self.bias_norm / self.mean_key_norm


class KeyRounding(Record):
    """Keys in fp8 or int8, values in 16 bits: the loss through the cache, with and without the mean taken out."""

    kind: Literal["fp8", "int8"]
    mean_out: bool
    quality: Quality


class Keys(Record):
    """What biases do to the keys of a model, and to keys that are rounded."""

    biases: list[KeyBias]
    roundings: list[KeyRounding]


class Advice(StoredRecord):
    """What to do with a model's cache within a budget; `chosen` None: nothing that was measured qualifies."""

    schema_version: Literal["eigencache.advice/1"] = "eigencache.advice/1"
    subject: str  # what was asked about: a model, or the file of a record
    model: Model
    budget: Budget
    protocol: ReadingProtocol
    calibration: Corpus
    choosing: Corpus
    stating: Corpus | None  # None: advice from a sweep, chosen and stated on the same tokens
    uncompressed_nll: float  # nats per token, on the choosing part
    chosen: Candidate | None
    others: list[Candidate]  # the best of every other target within the budget
    nearest: Candidate | None  # where nothing qualifies: the one with the lowest upper end
    keys: Keys | None  # None: no biases of keys, or not measured
    evidence: list[Evidence]
    unknown: list[str]
    sweeps: dict[str, SweepRecord]  # every point behind the advice, by pass
    run: Run
    warnings: list[str]

    @property
    def holds(self) -> bool | None:
        """Whether the chosen way's interval stays within the budget on the stating part; None where nothing tells."""
        stated = self.chosen.stating if self.chosen else None
        if stated is None or stated.delta_nll_interval is None:
            return None
        return stated.delta_nll_interval[1] <= self.budget.nats


class Verdict(Record):
    """What a report says about compressing one model: advice, or why there is none."""

    advice: Advice | None = None
    reason: str = ""


class ReportRecord(StoredRecord):
    """What stands behind one report: the probes, and a verdict on each where verdicts were asked for."""

    schema_version: Literal["eigencache.report/1"] = "eigencache.report/1"
    probes: list[ProbeRecord]
    verdicts: list[Verdict] = Field(default_factory=list)  # in the order of the probes
