"""Records of the text, the model and the run of a result; every stored record contains them."""

from eigencache.geometry import KVGeometry
from eigencache.records.base import Record


class Corpus(Record):
    """The text of a result, as it was tokenized."""

    name: str
    sha256: str  # of the text
    tokens: int  # used, without padding
    sequences: int
    max_length: int  # tokens of a sequence, at most
    distinct_token_ids: int
    distinct_8grams: int
    repetition: float  # 1 − distinct 8-grams / 8-grams: 0 for text without repetition
    warnings: list[str] = []


class Model(Record):
    """The model of a result."""

    name: str
    architecture: str
    dtype: str
    device: str
    parameters: int
    sha256: str  # of the configuration and of a sample of every weight
    adapter: str  # how the cache was captured
    geometry: KVGeometry


class Run(Record):
    """Versions, settings and cost of the run of a result."""

    eigencache: str  # version, like the next four
    python: str
    torch: str
    transformers: str
    numpy: str
    machine: str
    seed: int
    settings: dict[str, str | int | float | bool | None]
    started: str  # ISO 8601, UTC
    wall_s: float
    forward_s: float  # part of `wall_s` in forward passes of the model
    peak_memory_mb: float
