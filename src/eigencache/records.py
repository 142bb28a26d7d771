"""Typed, versioned results: what is written to JSON is read back equal, and a damaged file is refused by name.

A statistic without its frame, centring and scope is meaningless (THEORY 1), so every `Spectrum` carries all three,
together with how much data stands behind it. Rates of a share are fractions in [0, 1]. `None` means: the data
could not support this number, and `refusals` of the record says why.
"""

import os
import tempfile
from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from eigencache.errors import OutputError, RecordError
from eigencache.geometry import KVGeometry, tensor_name

Scope = Literal["head", "layer", "all"]
SCOPES: tuple[Scope, ...] = ("head", "layer", "all")
Interval = tuple[float, float]


class Record(BaseModel):
    """Base of all records: unknown fields are refused, infinities survive JSON."""

    model_config = ConfigDict(extra="forbid", ser_json_inf_nan="strings", val_json_bytes="utf8")


class StoredRecord(Record):
    """A record that is a file of its own: it names its schema, and is read back equal or refused."""

    def save(self, path: str | Path) -> None:
        """Write as JSON; the file appears whole or not at all."""
        write_whole(path, self.model_dump_json(indent=1).encode())

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read back what `save` wrote. Raises `RecordError`, naming the file and the first field at fault."""
        path = Path(path)
        schema = cls.model_fields["schema_version"].default
        try:
            return cls.model_validate_json(path.read_bytes())
        except OSError as error:
            raise RecordError(f"{path}: cannot be read ({error.strerror})") from error
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or "the file"
            raise RecordError(f"{path}: not a record of schema {schema}: {where}: {first['msg']}") from error


class Spectrum(Record):
    """The spectrum of one kind in one frame and scope, with every statistic of THEORY 3 and what supports it."""

    layer_idx: int | None  # None at scope `all`
    head: int | None  # None at scopes `layer` and `all`
    kind: str
    frame: str
    scope: Scope
    centred: bool
    width: int  # p
    vectors: int  # n: tokens that were summed up
    effective_vectors: float | None  # n_eff <= n, autocorrelation discounted; None with too few sequences
    distinct_contexts: int  # distinct 8-grams behind the vectors: no more independent rows than these
    support: float  # min(n_eff, distinct contexts) / p: below 10 ranks are doubtful, below 1 they are refused
    eigenvalues: list[float]  # descending, all p of them
    energy: dict[int, float]  # k -> share of the sum of the leading k
    held_out_energy: dict[int, float] | None  # the same on sequences the basis has not seen
    rank_90: int | None
    rank_95: int | None
    rank_99: int | None
    effective_rank: float | None  # exp of the entropy of the singular values (Roy & Vetterli 2007)
    effective_rank_eigen: float | None  # the same of the eigenvalues
    participation_ratio: float | None
    stable_rank: float | None
    condition_number: float | None  # sqrt(first / last eigenvalue); infinite is possible
    mean_norm: float  # norm of the mean vector
    mean_share: float  # |mean|^2 / E|x|^2: what a shared offset carries
    spread: float  # max / min standard deviation (root mean square if uncentred) over raw dimensions
    spread_p95_p5: float  # the same between the 95th and 5th percentiles
    null_edge: float | None  # Marchenko-Pastur upper edge of white noise of the same total
    null_eigenvalues: list[float] | None  # its expected eigenvalues, descending, at most 256 of them
    above_null: int | None  # eigenvalues above the edge
    split_half: float | None  # mean squared cosine of the principal angles of the halves' leading rank_90 subspaces
    intervals: dict[str, Interval] = {}  # statistic -> 95 % bootstrap interval over sequences
    refusals: list[str] = []
    warnings: list[str] = []

    @property
    def name(self) -> str:
        """Kind and frame in one word, such as `keys_pre_rope`."""
        return tensor_name(self.kind, self.frame)


class FrameComparison(Record):
    """How much of a layer's key spread is the rotation of a shared mean (RoPE models only)."""

    layer_idx: int
    kind: str
    spread_post_rope: float  # std over raw dimensions, as a Hugging Face cache holds them
    spread_pre_rope: float
    spread_pre_rope_uncentred: float  # root mean square instead of std: the mean counted in
    variance_post_rope: float  # total variance after rotation
    variance_pre_rope: float
    rotated_mean_share: float  # (variance_post - variance_pre) / variance_post: spread that rotation of the mean makes
    rank_90_post_rope: int | None
    rank_90_pre_rope: int | None


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


class ClassicRow(Record):
    """The historic probe: centred, post-RoPE, heads concatenated, averaged over layers, in-sample."""

    kind: str
    text: str
    vectors: int
    energy_16: float
    energy_32: float
    rank_99: float  # what the old tables called effective rank
    assessment: str


class ScoreRecord(Record):
    """How well a model predicts held-out text, and whether it copies from its context."""

    model: str
    corpus: Corpus
    loss_nats: float  # per token, over all positions
    loss_by_position: dict[int, float]  # upper end of a range of positions -> nats per token in it
    copy_accuracy: float
    run: Run


class ProbeRecord(StoredRecord):
    """Everything one probe of one model found."""

    schema_version: Literal["eigencache.probe/1"] = "eigencache.probe/1"
    model: Model
    corpus: Corpus
    run: Run
    spectra: list[Spectrum]
    frames: list[FrameComparison] = []
    classic: list[ClassicRow] = []
    warnings: list[str] = []

    def select(
        self,
        name: str | None = None,
        scope: Scope | None = None,
        layer_idx: int | None = None,
        head: int | None = None,
        centred: bool | None = True,
    ) -> list[Spectrum]:
        """All spectra that match; an argument that is None matches everything."""
        return [
            s
            for s in self.spectra
            if (name is None or s.name == name)
            and (scope is None or s.scope == scope)
            and (layer_idx is None or s.layer_idx == layer_idx)
            and (head is None or s.head == head)
            and (centred is None or s.centred == centred)
        ]

    @property
    def names(self) -> list[str]:
        """The captured tensors in the order of capture, such as `keys_pre_rope`, `keys_post_rope`, `values`."""
        return list(dict.fromkeys(s.name for s in self.spectra))


def write_whole(path: str | Path, data: bytes) -> None:
    """Write a file completely or not at all, also when interrupted. Raises `OutputError`."""
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
            Path(temporary).chmod(0o644)
            Path(temporary).replace(path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise OutputError(f"{path}: cannot be written ({error.strerror}): choose another output") from error
