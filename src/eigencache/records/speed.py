"""Records of measured times."""

from typing import Literal

from eigencache.records.base import Record, StoredRecord
from eigencache.records.run import Run

Part = Literal["attention", "decode", "generation", "prefill", "chunked prefill"]


class Timing(Record):
    """One way to do one thing: the median of its seconds, of a generation the mean per token, and the bytes it reads."""

    part: Part
    geometry: str
    context: int
    batch: int
    way: str
    seconds: float | None  # None where it cannot be done here
    nbytes: int | None
    operations: int | None = None  # of attention: products and sums
    why: str | None = None  # it cannot


class SpeedRecord(StoredRecord):
    """Timings of one machine in one run."""

    schema_version: Literal["eigencache-speed/1"] = "eigencache-speed/1"
    run: Run
    device: str
    dtype: str
    backend: str  # that reads packed blocks in a decode step
    layers: int
    chunk: int = 0  # tokens of a chunked prefill
    repeats: int
    read_bytes_per_second: float  # measured: a copy, half of what it moves
    operations_per_second: float  # measured: a product of matrices in the model's dtype
    timings: list[Timing]
