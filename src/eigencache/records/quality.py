"""Records of model quality with a compressed cache: losses, sweeps over ranks, generation, retrieval and bytes.

Differences are compressed minus uncompressed on the same tokens: a positive ΔNLL is a loss. Intervals are 95 %, from a
paired bootstrap over sequences.
"""

import math
import statistics
from typing import Literal

from eigencache.records.base import Centered, Interval, Record, StoredRecord
from eigencache.records.run import Corpus, Model, Run


class ReadingProtocol(Record):
    """How a text is read through the cache: a compressed prefix and the rest, or chunk by chunk."""

    kind: Literal["prefix", "chunked"]
    length: int  # tokens of the prefix, or of each chunk
    window: int = 0  # most recent tokens that stay uncompressed
    block: int = 1  # tokens that are compressed at a time, at least
    step: int = 0  # of a prefix protocol: tokens after the prefix that are read at a time; 0: all at once

    def describe(self) -> str:
        """Return the protocol as one line for tables."""
        if self.kind == "prefix":
            rest = (
                f"the rest scored {self.step:,} at a time with everything before them compressed"
                if self.step
                else "the rest scored"
            )
            return f"prefix of {self.length:,} tokens compressed, {rest}"
        return f"chunks of {self.length:,} tokens, all but the {self.window:,} most recent tokens compressed"


class SequenceLoss(Record):
    """Sums over the scored tokens of one sequence, for one codec."""

    tokens: int
    nll: float  # nats
    kl: float  # nats, KL(uncompressed ‖ compressed)
    agree: int  # tokens with the same most likely token


class Quality(Record):
    """Loss and bytes of one codec on one text."""

    codec: str
    tokens: int  # scored
    sequences: int
    nll: float  # nats per token
    delta_nll: float  # nats per token above the uncompressed cache
    delta_nll_interval: Interval | None  # None with fewer than 8 sequences
    kl: float  # nats per token
    kl_interval: Interval | None = None  # None with fewer than 8 sequences, and in records of earlier versions
    top1_agreement: float  # share of tokens with the same most likely token
    encoded_tokens: int  # that were compressed, over all sequences
    encoded_nbytes: int  # of their compressed cache
    sixteen_bit_nbytes: int  # of the same tokens in 16 bits: keys and values, or latent and rotary key
    basis_nbytes: int  # stored once: bases, means

    @property
    def perplexity_increase(self) -> float:
        """exp(ΔNLL) − 1, a share."""
        return math.expm1(self.delta_nll)

    @property
    def compression_ratio(self) -> float:
        """Bytes of the 16-bit cache / bytes of the compressed cache; the basis is not included."""
        return self.sixteen_bit_nbytes / self.encoded_nbytes

    @property
    def break_even_context(self) -> int | None:
        """Context length in tokens whose saved bytes equal the basis; None if nothing is saved."""
        saved = (self.sixteen_bit_nbytes - self.encoded_nbytes) / self.encoded_tokens
        return math.ceil(self.basis_nbytes / saved) if saved > 0 else None


class SweepPoint(Record):
    """One rank of a series."""

    rank: int  # coefficients per head, per layer or for all layers, depending on the scope
    target_ratio: float  # bytes of the target in 16 bits / bytes of its coefficients
    quality: Quality


class SweepSeries(Record):
    """One compression setting at several ranks, ascending."""

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
    """Loss and bytes by rank, for several compression settings of the cache of one model."""

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
    """Where greedy generation with a codec differs from that of the uncompressed cache, by prompt."""

    codec: str
    prompt_tokens: int
    new_tokens: int  # generated per prompt
    tokens_until_parting: list[int]  # by prompt: tokens before the first difference; `new_tokens` if there is none
    agreement: list[float]  # by prompt: share of equal tokens

    @property
    def mean_tokens_until_parting(self) -> float:
        """Mean over prompts; one without a difference counts with `new_tokens`."""
        return statistics.fmean(self.tokens_until_parting)

    @property
    def median_tokens_until_parting(self) -> float:
        """Median over prompts; one without a difference counts with `new_tokens`."""
        return statistics.median(self.tokens_until_parting)

    @property
    def mean_agreement(self) -> float:
        """Mean share of equal tokens over prompts."""
        return statistics.fmean(self.agreement)

    @property
    def median_agreement(self) -> float:
        """Median share of equal tokens over prompts."""
        return statistics.median(self.agreement)

    @property
    def never_parted(self) -> int:
        """Number of prompts without a difference."""
        return sum(tokens == self.new_tokens for tokens in self.tokens_until_parting)


class Accuracy(Record):
    """Number of examples of a task that are answered exactly."""

    codec: str
    correct: int
    examples: int
    interval: Interval  # 95 %, Wilson score interval of the accuracy

    @property
    def accuracy(self) -> float:
        """Share of the examples that are answered exactly."""
        return self.correct / self.examples


class Retrieval(Record):
    """One retrieval task at one length and depth, with the uncompressed cache and with codecs on the same examples."""

    task: str
    length: int  # tokens of the context
    depth: float | None  # position of the answer in the context, from 0 (start) to 1 (end); None if it is spread out
    answer_tokens: int
    chance: float  # accuracy of guessing
    threshold: float  # that the lower end of the uncompressed interval must exceed
    applicable: bool  # whether it does; if not, the model fails the task, and no codec is scored
    uncompressed: Accuracy
    results: list[Accuracy]

    def describe(self) -> str:
        """Return the accuracies as one line for tables, or that the task is not applicable."""
        if not self.applicable:
            return f"not applicable: uncompressed accuracy {self.uncompressed.accuracy:.2f}"
        return ", ".join(f"{a.codec} {a.accuracy:.2f}" for a in (self.uncompressed, *self.results))


class LedgerRow(Record):
    """Bytes of one sequence at one context length (THEORY 11)."""

    context: int  # tokens
    sixteen_bit_nbytes: int  # keys and values, or latent and rotary key
    payload_nbytes: int  # of the compressed cache, with scales
    basis_nbytes: int  # stored once for all sequences

    @property
    def ratio(self) -> float:
        """Bytes of the 16-bit cache / bytes of the compressed cache; the basis is not included."""
        return self.sixteen_bit_nbytes / self.payload_nbytes

    @property
    def ratio_with_basis(self) -> float:
        """Bytes of the 16-bit cache / bytes of the compressed cache and the basis, for a single sequence."""
        return self.sixteen_bit_nbytes / (self.payload_nbytes + self.basis_nbytes)


class Likelihood(Record):
    """Losses of codecs with one protocol, relative to the uncompressed cache."""

    protocol: ReadingProtocol
    uncompressed_nll: float  # nats per token
    results: list[Quality]


class EvaluationRecord(StoredRecord):
    """Effect of codecs on one model: likelihood, generation, retrieval, and bytes."""

    schema_version: Literal["eigencache.evaluation/1"] = "eigencache.evaluation/1"
    model: Model
    corpus: Corpus
    calibration: Corpus
    run: Run
    likelihood: list[Likelihood]
    divergence: list[Divergence]
    retrieval: list[Retrieval]
    ledgers: dict[str, list[LedgerRow]]  # codec → rows by ascending context length
    warnings: list[str]
