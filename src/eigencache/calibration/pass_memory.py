"""Predict the memory of passes through a model, beside its weights.

The numbers of tensors that are held at a time were counted in the code and checked against measured peaks (LOG.md,
2026-11-27).
"""

from eigencache.calibration.session import Session
from eigencache.corpora.sequences import Sequences
from eigencache.errors import StatisticsError
from eigencache.memory import LOGITS
from eigencache.models.load import LoadedModel

BACKWARD_TOKENS = 512  # of a backward pass, which keeps the activations of all layers
_FLOAT = 4  # bytes
_SMALLER_BATCHES = "Raise `memory`, lower `batch_size`, or use shorter sequences."
_CACHES, _HIDDENS, _INNERS = 3, 8, 4  # cache, hidden states and inner states of an MLP, in a forward pass
_SAVED_HIDDENS, _SAVED_INNERS = 8, 4  # kept of every layer for a backward pass
_LOGITS = 2  # logits, and what a loss makes of them
_LOSSES = 3  # logits, in float32 as well, and their logarithms, where a whole sequence is scored at once
_COMPARED = 10  # logits, those of the reference, and what a comparison makes of both


def forward_nbytes(loaded: LoadedModel, tokens: int) -> int:
    """Return the bytes of a forward pass without logits.

    Args:
        loaded: the model.
        tokens: tokens of the pass, of all sequences together.
    """
    hidden, inner = _widths(loaded)
    cached = loaded.geometry.values_per_token
    return _FLOAT * tokens * (_CACHES * cached + _HIDDENS * hidden + _INNERS * inner)


def beside_a_pass(session: Session, sequences: Sequences) -> int:
    """Return the bytes of the session's memory that a forward pass of a batch leaves.

    Args:
        session: the model, the size of its batches, and the memory that is allowed.
        sequences: the text.

    Raises:
        StatisticsError: a pass needs more than is allowed.
    """
    longest = max(map(len, sequences.ids))
    batch = min(session.batch_size, len(sequences.ids))
    needed = forward_nbytes(session.loaded, batch * longest)
    what = f"A pass of {batch} sequences of {longest:,} tokens"
    _require(session, needed, what, _SMALLER_BATCHES)
    return session.memory - needed


def backward_nbytes(loaded: LoadedModel, tokens: int = BACKWARD_TOKENS) -> int:
    """Return the bytes of a forward and a backward pass with logits; arguments as above."""
    hidden, inner = _widths(loaded)
    layers = loaded.geometry.num_hidden_layers
    saved = layers * (_SAVED_HIDDENS * hidden + _SAVED_INNERS * inner) + _CACHES * loaded.geometry.values_per_token
    logits = min(LOGITS, tokens * loaded.embedded_ids)
    return _FLOAT * (tokens * saved + _LOGITS * logits)


def scoring_nbytes(loaded: LoadedModel, batch: int, length: int, scored: int | None = None) -> int:
    """Return the bytes of scoring a codec, on as many sequences at a time as the logits allow.

    Args:
        loaded: the model.
        batch: most sequences of a pass.
        length: tokens of a sequence.
        scored: scored tokens of a pass and sequence. Default: half of the sequence.
    """
    scored = length // 2 if scored is None else scored
    rows = affordable_rows(loaded, batch, scored)
    return forward_nbytes(loaded, rows * length) + _FLOAT * _COMPARED * rows * scored * loaded.embedded_ids


def affordable_rows(loaded: LoadedModel, batch: int, scored: int) -> int:
    """Return how many sequences of a batch are scored at a time: as many as their logits allow, at least one."""
    return max(1, min(batch, LOGITS // max(1, scored * loaded.embedded_ids)))


def check_scoring(session: Session, length: int, scored: int) -> int:
    """Return the bytes of scoring a codec.

    Args:
        session: the model, the size of its batches, and the memory that is allowed.
        length: tokens of the longest sequence.
        scored: most scored tokens of a pass and sequence.

    Raises:
        StatisticsError: scoring needs more than is allowed.
    """
    needed = scoring_nbytes(session.loaded, session.batch_size, length, scored)
    rows = affordable_rows(session.loaded, session.batch_size, scored)
    what = f"Scoring {scored:,} tokens after {length - scored:,}"
    _require(session, needed, what, _SMALLER_BATCHES, of=f" for {rows} sequences at a time")
    return needed


def check_whole_pass(session: Session, length: int) -> int:
    """Return the bytes of a pass of one sequence with the logits of all its tokens, and of their loss.

    Args:
        session: the model, and the memory that is allowed.
        length: tokens of the sequence.

    Raises:
        StatisticsError: the pass needs more than is allowed.
    """
    loaded = session.loaded
    needed = forward_nbytes(loaded, length) + _FLOAT * _LOSSES * length * loaded.embedded_ids
    what = f"A pass of {length:,} tokens with {loaded.embedded_ids:,} logits each"
    _require(session, needed, what, "Raise `memory` or lower `max_length`.")
    return needed


def described(needed: int, allowed: int) -> str:
    """Return predicted and allowed bytes as one phrase for progress reports."""
    return f"about {needed / 2**30:.1f} GiB beside the model, of {allowed / 2**30:.1f} GiB allowed"


def _require(session: Session, needed: int, what: str, remedy: str, of: str = "") -> None:
    """Raise `StatisticsError` if `what` needs more bytes than the session allows."""
    if needed > session.memory:
        raise StatisticsError(
            f"{what} needs about {needed / 2**30:.2g} GiB beside the model{of}, more than a `memory` of "
            f"{session.memory / 2**30:.2g} GiB. {remedy}"
        )


def _widths(loaded: LoadedModel) -> tuple[int, int]:
    """Return the width of the hidden state and of the inner state of an MLP."""
    hidden = loaded.geometry.hidden_size
    inner = getattr(loaded.model.config.get_text_config(), "intermediate_size", None)
    return hidden, inner if isinstance(inner, int) else 4 * hidden
