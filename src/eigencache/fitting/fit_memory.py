"""Predict the memory of a fit beside the model, and how many vectors fit into what is allowed."""

from dataclasses import dataclass

from eigencache.calibration.pass_memory import backward_nbytes, described, forward_nbytes, scoring_nbytes
from eigencache.calibration.session import Session
from eigencache.corpora.sequences import Sequences
from eigencache.errors import StatisticsError
from eigencache.fitting.eigen import EigenSettings
from eigencache.geometry import KVGeometry

_GIB = 2**30
_FLOAT, _DOUBLE = 4, 8  # bytes
_LEAST = 16  # sequences that a fit needs
MOST_VECTORS = (
    32_768  # the time of a fit grows with them; from 16,384 to 32,768 they saved 5 % of the bits (LOG.md, 2026-11-27)
)
_STAGES = 7  # copies of the columns of a stage that are held at a time
_SQUARES = 8  # square matrices in float64 that a stage needs


@dataclass(frozen=True)
class FitMemory:
    """Memory of a fit beside the model, in bytes.

    Args:
        fixed: largest pass of the model, or the matrices of a stage, which are not held at the same time.
        per_token: what a token costs whose vector is sampled.
        tokens: tokens of the text.
        allowed: what the fit may take.
    """

    fixed: int
    per_token: int
    tokens: int
    allowed: int

    @property
    def sampled(self) -> int:
        """Tokens whose vectors are sampled: as many as fit into what is allowed, and as many as are worth their time."""
        return min(self.tokens, MOST_VECTORS, max(0, self.allowed - self.fixed) // self.per_token)

    @property
    def needed(self) -> int:
        """Predicted peak."""
        return self.fixed + self.sampled * self.per_token

    def describe(self) -> str:
        """Return one line: the prediction, the limit, and the share of the text whose vectors are sampled."""
        share = "" if self.sampled == self.tokens else f", vectors of {self.sampled:,} of {self.tokens:,} tokens"
        return described(self.needed, self.allowed) + share


def fit_memory(session: Session, sequences: Sequences, settings: EigenSettings) -> FitMemory:
    """Predict the memory of a fit of `eigen`.

    Args:
        session: the model, the size of its batches, and the memory that is allowed.
        sequences: the calibration text.
        settings: settings of the fit.

    Raises:
        StatisticsError: not even the fewest sequences that a fit needs are allowed.
    """
    loaded, longest = session.loaded, max(map(len, sequences.ids))
    tokens = sum(map(len, sequences.ids))
    stage = _widest(loaded.geometry, settings)
    memory = FitMemory(
        fixed=max(
            forward_nbytes(loaded, min(session.batch_size * longest, tokens)),
            backward_nbytes(loaded, longest) if settings.metric != "frobenius" else 0,
            scoring_nbytes(loaded, session.batch_size, longest),
            _SQUARES * _DOUBLE * stage**2,
        ),
        per_token=2 * loaded.geometry.values_per_token + _STAGES * _FLOAT * stage,
        tokens=tokens,
        allowed=session.memory,
    )
    fewest = min(tokens, MOST_VECTORS, _LEAST * longest)
    if memory.sampled < fewest:
        least = (memory.fixed + fewest * memory.per_token) / _GIB
        raise StatisticsError(
            f"A fit needs about {least:.1f} GiB beside the model, more than a `memory` of {session.memory / _GIB:.1f} GiB. "
            "Raise `memory`, or lower `batch_size`, `max_length` or `group`."
        )
    return memory


def _widest(geometry: KVGeometry, settings: EigenSettings) -> int:
    """Return the columns of the widest stage."""
    layers = [layer for layer in geometry.layers if layer.cached]
    heads = [
        (1, (layer.mla.kv_lora_rank, layer.mla.qk_rope_head_dim))
        if layer.mla
        else (layer.num_key_value_heads, (layer.head_dim, layer.v_head_dim))
        for layer in layers
    ]
    if settings.scope == "head":
        return max(max(dims) for _, dims in heads)
    if settings.scope == "layer":
        return max(count * max(dims) for count, dims in heads)
    widths = [count * sum(dims) for count, dims in heads]
    if settings.scope == "joint":
        return sum(widths)
    return max(sum(widths[i : i + settings.group]) for i in range(0, len(widths), settings.group))
