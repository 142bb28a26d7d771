"""Records of quality through the cache: losses per sequence, what they say together, and curves over ranks.

Differences are compressed minus uncompressed on the same tokens, so a positive ΔNLL is a loss. Intervals are 95 %
bootstrap intervals over sequences, paired.
"""

import math
import statistics
from typing import Literal

from eigencache.records.base import Centered, Interval, Record, StoredRecord
from eigencache.records.run import Corpus, Model, Run


class ReadingProtocol(Record):
    """How a text was read through the cache: in pieces, what lies before each piece and its window held encoded."""

    kind: Literal["prefix", "chunked"]
    length: int  # tokens of the prefix, or of each chunk
    window: int = 0  # most recent tokens that stay as they are
    block: int = 1  # least tokens that are encoded at a time
    step: int = 0  # behind a prefix, tokens that are read at a time, all before them held encoded; 0: all

    def describe(self) -> str:
        """One line for tables."""
        if self.kind == "prefix":
            rest = (
                f"the rest scored {self.step:,} at a time, all before them held encoded" if self.step else "the rest scored"
            )
            return f"prefix of {self.length:,} tokens encoded and decoded, {rest}"
        return f"chunks of {self.length:,}, all older than {self.window:,} tokens held encoded"


class SequenceLoss(Record):
    """Sums over the scored tokens of one sequence for one codec."""

    tokens: int
    nll: float  # nats
    kl: float  # nats, KL(uncompressed ‖ compressed)
    agree: int  # tokens where both rank the same token first


class Quality(Record):
    """What one codec costs: bytes that exist against loss through the cache."""

    codec: str
    tokens: int  # scored
    sequences: int
    nll: float  # nats per token
    delta_nll: float  # nats per token above the uncompressed cache
    delta_nll_interval: Interval | None  # None with fewer than 8 sequences
    kl: float  # nats per token
    top1_agreement: float  # share of tokens
    encoded_tokens: int  # positions that were held encoded, all sequences
    encoded_nbytes: int  # bytes that were held for them
    sixteen_bit_nbytes: int  # bytes of 16-bit keys and values (or latent and rotary key) of the same positions
    basis_nbytes: int  # held once: bases, means

    @property
    def perplexity_increase(self) -> float:
        """exp(ΔNLL) − 1, a share."""
        return math.expm1(self.delta_nll)

    @property
    def compression_ratio(self) -> float:
        """16-bit bytes of K and V over bytes held, the basis apart."""
        return self.sixteen_bit_nbytes / self.encoded_nbytes

    @property
    def break_even_context(self) -> int | None:
        """Context length in tokens whose saved bytes equal the basis; None if nothing is saved."""
        saved = (self.sixteen_bit_nbytes - self.encoded_nbytes) / self.encoded_tokens
        return math.ceil(self.basis_nbytes / saved) if saved > 0 else None


class SweepPoint(Record):
    """One rank of a series."""

    rank: int  # coefficients per group: per head, per layer or for all layers, by scope
    target_ratio: float  # 16-bit bytes of what the target holds over the bytes of its coefficients
    quality: Quality


class SweepSeries(Record):
    """One way of compressing, at several ranks; ranks ascending."""

    name: str
    target: str
    scope: str
    frame: str
    metric: str
    centered: Centered
    alpha: float
    basis: str
    bits: int
    sinks: int = 0  # first tokens in 16 bits
    width: int  # full rank
    points: list[SweepPoint]


class SweepRecord(StoredRecord):
    """Quality against rank and bytes, for several ways of compressing one model's cache directly."""

    schema_version: Literal["eigencache.sweep/1"] = "eigencache.sweep/1"
    model: Model
    corpus: Corpus
    calibration: Corpus
    protocol: ReadingProtocol
    run: Run
    uncompressed_nll: float  # nats per token
    series: list[SweepSeries]
    warnings: list[str]


class Divergence(Record):
    """Where greedy generation through a codec parts from the uncompressed one, prompt by prompt."""

    codec: str
    prompt_tokens: int
    new_tokens: int  # generated per prompt
    tokens_until_parting: list[int]  # per prompt: equal tokens before the first other one; new_tokens if there is none
    agreement: list[float]  # per prompt: share of positions with equal tokens

    @property
    def mean_tokens_until_parting(self) -> float:
        """Over prompts; those that never part count with new_tokens."""
        return statistics.fmean(self.tokens_until_parting)

    @property
    def median_tokens_until_parting(self) -> float:
        """Over prompts; those that never part count with new_tokens."""
        return statistics.median(self.tokens_until_parting)

    @property
    def mean_agreement(self) -> float:
        """Over prompts, a share."""
        return statistics.fmean(self.agreement)

    @property
    def median_agreement(self) -> float:
        """Over prompts, a share."""
        return statistics.median(self.agreement)

    @property
    def never_parted(self) -> int:
        """Prompts whose answers are equal to the end."""
        return sum(tokens == self.new_tokens for tokens in self.tokens_until_parting)


class Accuracy(Record):
    """How many examples of a task are answered exactly."""

    codec: str
    correct: int
    examples: int
    interval: Interval  # 95 %, Wilson's, of the accuracy

    @property
    def accuracy(self) -> float:
        """A share of the examples."""
        return self.correct / self.examples


class Retrieval(Record):
    """One retrieval task at one length and depth: the uncompressed cache, and codecs on the same examples."""

    task: str
    length: int  # tokens of the context
    depth: float | None  # where what is asked for lies, from 0 (start) to 1 (end); None where it lies all over
    answer_tokens: int
    chance: float  # accuracy of taking a place of the right kind at random
    threshold: float  # the lower end of the uncompressed interval must lie above it
    applicable: bool  # whether it does: if not, the model cannot do the task, and no codec is scored
    uncompressed: Accuracy
    results: list[Accuracy]

    def describe(self) -> str:
        """One line for tables: accuracies, or that the task is not applicable."""
        if not self.applicable:
            return f"not applicable: uncompressed accuracy {self.uncompressed.accuracy:.2f}"
        return ", ".join(f"{a.codec} {a.accuracy:.2f}" for a in (self.uncompressed, *self.results))


class LedgerRow(Record):
    """Bytes of one sequence at one context length (THEORY 11)."""

    context: int  # tokens
    sixteen_bit_nbytes: int  # K and V, or latent and rotary key
    payload_nbytes: int  # everything held per token, scales included
    basis_nbytes: int  # held once, for all sequences

    @property
    def ratio(self) -> float:
        """Without the basis, which many sequences share."""
        return self.sixteen_bit_nbytes / self.payload_nbytes

    @property
    def ratio_with_basis(self) -> float:
        """With the basis, as if there were this sequence alone."""
        return self.sixteen_bit_nbytes / (self.payload_nbytes + self.basis_nbytes)


class Likelihood(Record):
    """Codecs under one protocol, each against the uncompressed cache."""

    protocol: ReadingProtocol
    uncompressed_nll: float  # nats per token
    results: list[Quality]


class EvaluationRecord(StoredRecord):
    """What codecs of one model do to what it says: likelihood, generation, retrieval, and their bytes."""

    schema_version: Literal["eigencache.evaluation/1"] = "eigencache.evaluation/1"
    model: Model
    corpus: Corpus
    calibration: Corpus
    run: Run
    likelihood: list[Likelihood]
    divergence: list[Divergence]
    retrieval: list[Retrieval]
    ledgers: dict[str, list[LedgerRow]]  # codec → context lengths ascending
    warnings: list[str]
