"""The text, the model and the run behind a result."""

from eigencache.geometry import KVGeometry
from eigencache.records.base import Record


class Corpus(Record):
    """Which text stands behind a result."""

    name: str
    sha256: str  # of the text that was read
    tokens: int  # used, padding not counted
    sequences: int
    max_length: int
    distinct_token_ids: int
    distinct_8grams: int
    repetition: float  # 1 - distinct 8-grams / 8-grams: 0 for text that never repeats
    warnings: list[str] = []


class Model(Record):
    """Which model stands behind a result."""

    name: str
    architecture: str
    dtype: str
    device: str
    parameters: int
    sha256: str  # of the configuration and of a sample of every weight
    adapter: str  # how the cache was captured
    geometry: KVGeometry


class Run(Record):
    """How a result came about."""

    eigencache: str
    python: str
    torch: str
    transformers: str
    numpy: str
    machine: str
    seed: int
    settings: dict[str, str | int | float | bool | None]
    started: str  # ISO 8601, UTC
    wall_s: float
    forward_s: float  # of it in the model's forward passes
    peak_memory_mb: float
