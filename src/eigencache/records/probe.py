"""Typed, versioned results: what is written to JSON is read back equal, and a damaged file is refused by name.

A statistic without its frame, centering and scope is meaningless (THEORY 1), so every `Spectrum` carries all three,
together with how much data stands behind it. Rates of a share are fractions in [0, 1]. `None` means: the data
could not support this number, and `refusals` of the record says why.
"""

from typing import Literal

from eigencache.geometry import tensor_name
from eigencache.records.base import Centered, Interval, Record, Scope, StoredRecord
from eigencache.records.run import Corpus, Model, Run


class Spectrum(Record):
    """The spectrum of one kind in one frame and scope, with every statistic of THEORY 3 and what supports it."""

    layer_idx: int | None  # None at scope `all`
    head: int | None  # None at scopes `layer` and `all`
    kind: str
    frame: str
    scope: Scope
    centered: Centered
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
    spread: float  # max / min standard deviation (root mean square if uncentered) over raw dimensions
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
    spread_pre_rope_uncentered: float  # root mean square instead of std: the mean counted in
    variance_post_rope: float  # total variance after rotation
    variance_pre_rope: float
    rotated_mean_share: float  # (variance_post - variance_pre) / variance_post: spread that rotation of the mean makes
    rank_90_post_rope: int | None
    rank_90_pre_rope: int | None


class ClassicRow(Record):
    """The historic probe: centered, post-RoPE, heads concatenated, averaged over layers, in-sample."""

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
        centered: bool | None = True,
    ) -> list[Spectrum]:
        """All spectra that match; an argument that is None matches everything."""
        return [
            s
            for s in self.spectra
            if (name is None or s.name == name)
            and (scope is None or s.scope == scope)
            and (layer_idx is None or s.layer_idx == layer_idx)
            and (head is None or s.head == head)
            and (centered is None or s.centered == centered)
        ]

    @property
    def names(self) -> list[str]:
        """The captured tensors in the order of capture, such as `keys_pre_rope`, `keys_post_rope`, `values`."""
        return list(dict.fromkeys(s.name for s in self.spectra))
