"""Limits of the settings of a fit, and of its sequences, which are checked before anything is measured."""

from eigencache.corpora.sequences import Sequences
from eigencache.errors import CodecError, StatisticsError
from eigencache.kernels.packed.format import BLOCK


def check_at_least(settings: object, **least: float) -> None:
    """Raise `CodecError` for a setting below its least value; None is not compared."""
    for name, lowest in least.items():
        if (value := getattr(settings, name)) is not None and not value >= lowest:
            raise CodecError(f"`{name}`={value} must be at least {lowest}.")


def check_packed_block(sequences: Sequences, exact: int) -> None:
    """Check that the live cache packs a block of the first half of every sequence, so that its loss can be measured.

    Args:
        sequences: the calibration text.
        exact: first and last tokens that are not packed.

    Raises:
        StatisticsError: the sequences are too short.
    """
    length = sequences.corpus.max_length
    if length // 2 < exact + BLOCK:
        raise StatisticsError(
            f"Sequences of {length} tokens are too short: no block of {BLOCK} tokens is ever packed. "
            f"Use `max_length` ≥ {2 * (exact + BLOCK)}."
        )
