"""Records of measured times: attention, decode steps, generations and prefills of the live cache and other caches."""

from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, model_validator

from eigencache.records.base import Record, StoredRecord
from eigencache.records.run import Run

Part = Literal["attention", "decode", "generation", "prefill", "chunked prefill"]
Schema = Literal["eigencache.speed/1"]


def _current_schema(schema: object) -> object:
    """Return the schema id of today for the id that the first files carry."""
    return "eigencache.speed/1" if schema == "eigencache-speed/1" else schema


class Timing(Record):
    """Time of one implementation of one part, with the bytes that it reads."""

    part: Part
    geometry: str  # of the model, such as `llama-3-8b`
    context: int  # tokens in the cache; of a prefill, of the prompt
    batch: int
    way: str  # the implementation, such as `DynamicCache`
    seconds: float | None  # median of the repeats, of a generation the mean per token; None if it cannot run here
    nbytes: int | None  # bytes of the cache; None for a prefill
    operations: int | None = None  # additions and multiplications of one attention
    why: str | None = None  # reason for `seconds` None


class SpeedRecord(StoredRecord):
    """Timings of one machine in one run."""

    schema_version: Annotated[Schema, BeforeValidator(_current_schema)] = "eigencache.speed/1"
    run: Run
    device: str  # name of the GPU, or `cpu`
    dtype: str
    backend: str  # that reads packed blocks in a decode step
    layers: int  # of the model with random weights
    chunk: int = 0  # tokens of a piece of the chunked prefill
    repeats: int  # behind every median, apart from prefills
    generation_rounds: int = 5  # behind every mean of a generation; older files do not record it
    prefill_repeats: int = 0  # behind every median of a prefill; 0 is replaced by min(5, repeats), as older files have it
    read_bytes_per_second: float  # measured on a copy: half of the bytes that it moves
    operations_per_second: float  # measured on a matrix product in the model's dtype
    timings: list[Timing]

    @model_validator(mode="after")
    def _fill_prefill_repeats(self) -> Self:
        self.prefill_repeats = self.prefill_repeats or min(5, self.repeats)
        return self
