"""Records of a probe: spectra of the cached tensors, and the figures of the original probe.

A statistic has no meaning without its frame, centering and scope (THEORY 1), so every `Spectrum` has all three, and the
amount of data it rests on. Shares are in [0, 1]. `None`: withheld, because the sample cannot support the number;
`refusals` gives the reason.
"""

from typing import Literal

from pydantic import AliasChoices, Field

from eigencache.geometry import tensor_name
from eigencache.records.base import Centered, Interval, Record, Scope, StoredRecord
from eigencache.records.run import Corpus, Model, Run


class Spectrum(Record):
    """The spectrum of one tensor at one scope, with the statistics of THEORY 3 and their support."""

    layer_idx: int | None  # None at scope `all`
    head: int | None  # None at scopes `layer` and `all`
    kind: str  # such as `keys`, `values`, `latent`
    frame: str  # `pre_rope`, `post_rope` or `unrotated`
    scope: Scope
    centered: Centered
    width: int  # p
    vectors: int  # n, vectors in the moments: all tokens, or a sample of them at scope `all` of wide models
    effective_vectors: float | None  # n_eff ≤ n, corrected for autocorrelation; None with too few sequences
    distinct_contexts: int  # distinct 8-grams of the text: an upper bound of the independent vectors
    support: float  # min(n_eff, distinct_contexts) / p; below 10 ranks are doubtful, below 1 withheld
    eigenvalues: list[float]  # all p, descending
    energy: dict[int, float]  # k → share of the sum in the leading k
    held_out_energy: dict[int, float] | None  # k → the same on held-out sequences
    rank_90: int | None  # smallest k with 90 % of the energy
    rank_95: int | None
    rank_99: int | None
    effective_rank: float | None  # exp of the entropy of the singular values (Roy & Vetterli 2007)
    effective_rank_eigen: float | None  # exp of the entropy of the eigenvalues
    participation_ratio: float | None
    stable_rank: float | None
    condition_number: float | None  # sqrt(first / last eigenvalue); infinite is possible
    mean_norm: float  # norm of the mean vector
    mean_share: float  # |mean|² / E|x|²
    spread: float | None  # max / min standard deviation (root mean square if uncentered) over raw dimensions that vary
    spread_p95_p5: float | None  # ratio of the 95th to the 5th percentile of the same; both are None if none varies
    dead: list[int] = []  # raw dimensions that never vary (are always zero if uncentered), left out of the spreads
    null_edge: float | None  # upper edge of the Marchenko–Pastur law of white noise with the same total variance
    null_eigenvalues: list[float] | None  # expected eigenvalues of that noise, descending, at most 256
    above_null: int | None  # number of eigenvalues above the edge
    split_half: float | None  # mean squared cosine of the principal angles between the rank_90 subspaces of two halves
    intervals: dict[str, Interval] = {}  # statistic → 95 % interval, bootstrap over sequences
    refusals: list[str] = []  # reasons for withheld statistics
    warnings: list[str] = []

    @property
    def name(self) -> str:
        """Name of the tensor: kind and frame, such as `keys_pre_rope`."""
        return tensor_name(self.kind, self.frame)


class FrameComparison(Record):
    """Spread and variance of the keys of one layer before and after rotation (models with RoPE only)."""

    layer_idx: int
    kind: str
    spread_post_rope: float | None  # max / min standard deviation over raw dimensions that vary, of keys as cached
    spread_pre_rope: float | None
    spread_pre_rope_uncentered: float | None = Field(
        validation_alias=AliasChoices("spread_pre_rope_uncentered", "spread_pre_rope_uncentred")
    )  # of the root mean square instead of the standard deviation
    variance_post_rope: float  # total variance after rotation
    variance_pre_rope: float
    rotated_mean_share: float  # (variance_post − variance_pre) / variance_post: variance that rotating the mean causes
    rank_90_post_rope: int | None
    rank_90_pre_rope: int | None


class ClassicRow(Record):
    """A row of the original probe: centered, post-RoPE, heads concatenated, in-sample, mean over layers."""

    kind: str
    text: str
    vectors: int
    distinct_vectors: int | None = None  # vectors whose contexts differ; None: not counted
    energy_16: float
    energy_32: float
    rank_99: float  # the original tables call it effective rank
    assessment: str


class SlotSinks(Record):
    """Norms of one cached slot of a layer, by head, and gradient energy by position."""

    kind: str  # `keys`, `values`, `latent` or `key_rope`
    first_norm: list[float]  # of the first token, mean over sequences
    median_norm: list[float]  # of all tokens
    largest_norm: list[float]  # of all tokens
    largest_position: list[int]  # position of that token in its sequence
    gradient_energy: list[float] | None = None  # E|g|² over all heads at positions 0, 1, …, 15; None: not measured
    gradient_energy_rest: float | None = None  # mean over the later positions; None without later positions
    gradient_share: float | None = None  # share of Σ|g|² that the first four tokens have


class LayerSinks(Record):
    """Attention that the first tokens of a layer receive, one number per KV head; empty where it was not measured.

    A share is the mean attention weight on a position, over the query heads of a KV head and over the queries that can
    attend to the position and are at least 16 positions later. For the first four tokens, queries count for all or none.
    """

    layer_idx: int
    first_share: list[float] = []  # first token
    first_four_share: list[float] = []  # first four tokens together
    other_share: list[float] = []  # largest of a later position for which at least half as many queries count
    other_position: list[int] = []  # that position; −1 without one
    slots: list[SlotSinks] = []


class SinkStatistics(Record):
    """Attention sinks of a model: attention received, norms and gradients of its first tokens."""

    sequences: int  # that were read
    tokens: int
    layers: list[LayerSinks]
    exact_tokens: int | None = None  # first tokens that a fit in the Fisher metric stores exactly; None: not measured
    reasons: list[str] = []  # of attention and gradients that were not measured


class ScoreRecord(Record):
    """Held-out loss of one model, and its accuracy in copying from the context."""

    model: str
    corpus: Corpus
    loss_nats: float  # per token, over all positions
    loss_by_position: dict[int, float]  # upper end of a range of positions → nats per token
    copy_accuracy: float  # share of tokens
    run: Run


class ProbeRecord(StoredRecord):
    """The result of one probe of one model."""

    schema_version: Literal["eigencache.probe/1"] = "eigencache.probe/1"
    model: Model
    corpus: Corpus
    run: Run
    spectra: list[Spectrum]
    frames: list[FrameComparison] = []
    classic: list[ClassicRow] = []
    sinks: SinkStatistics | None = None  # None in records of earlier versions
    warnings: list[str] = []

    def select(
        self,
        name: str | None = None,
        scope: Scope | None = None,
        layer_idx: int | None = None,
        head: int | None = None,
        centered: bool | None = True,
    ) -> list[Spectrum]:
        """Return all matching spectra; an argument of None matches everything.

        Args:
            name: Name of the tensor, such as `keys_pre_rope`.
            scope: `head`, `layer` or `all`.
            layer_idx: Index of the layer.
            head: Index of the KV head.
            centered: Whether the mean was subtracted.
        """
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
        """Names of the captured tensors in order of capture, such as `keys_pre_rope`, `keys_post_rope`, `values`."""
        return list(dict.fromkeys(s.name for s in self.spectra))
