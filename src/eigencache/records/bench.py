"""Records of a comparison of methods at equal loss."""

from typing import Literal

from eigencache.records.base import Interval, Record, StoredRecord
from eigencache.records.quality import Divergence, Quality, Retrieval
from eigencache.records.run import Corpus, Model, Run


class BenchPoint(Record):
    """One operating point of a method, fitted with one calibration seed, at one length of context."""

    method: str
    point: str
    seed: int
    context: int  # tokens held encoded
    quality: Quality
    excess: list[float]  # nats above the uncompressed cache, sequence by sequence

    @property
    def bits_per_value(self) -> float:
        """All bytes held for the context, basis apart, over the numbers of its cache."""
        return 16 / self.quality.compression_ratio


class EqualLoss(Record):
    """What a method holds at a given loss, read off its interpolated curve; None where the curve does not get there."""

    method: str
    context: int
    delta_nll: float  # nats
    bits_per_value: float | None  # geometric mean over seeds; their median where some do not cross
    interval: Interval | None  # 95 %, bootstrap over sequences and seeds
    by_seed: list[float | None]
    why: str = ""  # there is none


class BenchRecord(StoredRecord):
    """Methods at equal loss: quality against all bytes held, on one model."""

    schema_version: Literal["eigencache.bench/1"] = "eigencache.bench/1"
    model: Model
    corpora: dict[int, Corpus]  # context → what was scored
    calibration: Corpus
    scored: int  # tokens behind the context, of every sequence
    step: int = 0  # of which so many were read at a time, all before them held; 0: all
    uncompressed_nll: dict[int, float]  # context → nats per token
    refused: dict[str, str]  # method → why this model cannot have it
    points: list[BenchPoint]
    equal_loss: list[EqualLoss]
    divergence: list[Divergence]
    retrieval: list[Retrieval]
    run: Run
    warnings: list[str]
