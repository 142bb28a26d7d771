"""Does a text that a codec is judged on repeat the one it was fitted on? Told by long n-grams of token ids.

A text judged on its own calibration text looks better than it is. Programs share short phrases, so windows of 32
tokens are compared; a hash collision (64 bits) is the only source of a wrong hit.
"""

import numpy as np

from eigencache.errors import CorpusError

GRAM = 32  # tokens
MAX_SHARE = 0.05  # of the windows; licences and boilerplate stay below it

_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)


def overlap_share(ids: list[np.ndarray], other: list[np.ndarray], gram: int = GRAM) -> float:
    """The share of the windows of `gram` tokens in `ids` that occur anywhere in `other`, in [0, 1]."""
    windows = np.concatenate([_hashes(row, gram) for row in ids])
    if not len(windows):
        return 0.0
    return float(np.isin(windows, np.unique(np.concatenate([_hashes(row, gram) for row in other]))).mean())


def check_overlap(ids: list[np.ndarray], other: list[np.ndarray], *, force: bool = False) -> str | None:
    """None for texts that stay apart; a warning for the record where `force` lets an overlap pass.

    Raises `CorpusError` with the share otherwise.
    """
    share = overlap_share(ids, other)
    if share <= MAX_SHARE:
        return None
    found = f"{100 * share:.0f} % of the evaluation text's {GRAM}-token windows occur in the calibration text"
    if not force:
        raise CorpusError(f"{found}: figures would flatter; choose another --text or --calibration-text, or --force")
    return f"OVERLAP: {found}: these figures flatter"


def _hashes(row: np.ndarray, gram: int) -> np.ndarray:
    """One 64-bit number per window: a polynomial in the token ids modulo 2^64, mixed."""
    if len(row) < gram:
        return np.empty(0, dtype=np.uint64)
    windows = np.lib.stride_tricks.sliding_window_view(row.astype(np.uint64) + np.uint64(1), gram)
    value = np.zeros(len(windows), dtype=np.uint64)
    with np.errstate(over="ignore"):
        for column in range(gram):
            value = (value ^ (windows[:, column] * _MULTIPLIER)) * _MULTIPLIER
            value ^= value >> np.uint64(29)
    return value
