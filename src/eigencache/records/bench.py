"""Records of a comparison of compression methods: operating points, and their rates at equal loss."""

import math
from collections.abc import Sequence
from typing import Literal, Self

from pydantic import model_validator

from eigencache.records.base import Interval, Record, StoredRecord
from eigencache.records.frontier import median_of
from eigencache.records.quality import Divergence, Quality, Retrieval
from eigencache.records.run import Corpus, Model, Run


class BenchPoint(Record):
    """One operating point of a method, fitted with one calibration seed and measured at one context length."""

    method: str
    point: str  # setting of the method, such as its bit width
    seed: int  # of the calibration
    context: int  # compressed tokens
    quality: Quality
    excess: list[float]  # nats above the uncompressed cache, by sequence

    @property
    def bits_per_value(self) -> float:
        """Rate: bits of the compressed cache per cached number, without side information."""
        return 16 / self.quality.compression_ratio


class EqualLoss(Record):
    """Rate of a method at a given loss, interpolated between its operating points."""

    method: str
    context: int  # compressed tokens
    delta_nll: float  # nats per token
    bits_per_value: float | None  # geometric mean over seeds; their median if some have no crossing; None if that has none
    interval: Interval | None  # 95 %, bootstrap over sequences and seeds
    by_seed: list[float | None]  # bits per value; None for a seed whose curve does not cross `delta_nll`
    why: str = ""  # reason for a seed without a crossing
    end: Literal["fewest", "most"] | None = None  # end of the curve that is nearest to `delta_nll` if the median is None
    end_bits: float | None = None  # bits per value at that end: the lowest or the highest rate that was tested

    @property
    def median_bits(self) -> float | None:
        """Median over seeds of the bits per value; a seed without a crossing counts as more bits than any."""
        return median_of(self.by_seed)[0]

    @property
    def at_most_bits(self) -> float:
        """Upper bound of the rate: the median, else the lowest rate tested if it suffices, else infinity."""
        if self.median_bits is not None:
            return self.median_bits
        return self.end_bits if self.end == "fewest" and self.end_bits is not None else math.inf

    def with_end(self, points: Sequence[BenchPoint]) -> Self:
        """Fill `end` and `end_bits` from the operating points; files of earlier versions lack them.

        Args:
            points: Operating points of any method; those of this method and context are used.
        """
        mine = [p for p in points if (p.method, p.context) == (self.method, self.context)]
        if self.end is not None or self.median_bits is not None or not mine:
            return self
        lowest = [
            min((p for p in mine if p.seed == seed), key=lambda p: p.bits_per_value) for seed in {p.seed for p in mine}
        ]
        below = sum(p.quality.delta_nll <= self.delta_nll for p in lowest)
        rates = [p.bits_per_value for p in mine]
        if 2 * below > len(lowest):
            return self.model_copy(update={"end": "fewest", "end_bits": min(rates)})
        return self.model_copy(update={"end": "most", "end_bits": max(rates)})


class BenchRecord(StoredRecord):
    """Compression methods on one model: loss against bytes, and rates at equal loss."""

    schema_version: Literal["eigencache.bench/1"] = "eigencache.bench/1"
    model: Model
    corpora: dict[int, Corpus]  # context length → the text that was scored
    calibration: Corpus
    scored: int  # tokens of every sequence after the context, the first of which has no loss
    step: int = 0  # tokens of the scored part that are read at a time; 0: all
    uncompressed_nll: dict[int, float]  # context length → nats per token
    refused: dict[str, str]  # method → reason why it does not support this model
    points: list[BenchPoint]
    equal_loss: list[EqualLoss]
    divergence: list[Divergence]
    retrieval: list[Retrieval]
    run: Run
    warnings: list[str]

    @model_validator(mode="after")
    def _fill_ends(self) -> Self:
        self.equal_loss = [rate.with_end(self.points) for rate in self.equal_loss]
        return self
