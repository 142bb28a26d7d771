"""Bytes at equal loss: a method's operating points as a curve, and where it crosses a loss.

Between points bits are interpolated on a logarithmic scale, losses too where both are positive. A curve is first made to
fall with bits, as it does but for noise (pool adjacent violators). Nothing is extrapolated.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from math import inf

import numpy as np

from eigencache.records.base import Interval

REPLICATES = 1000


@dataclass(frozen=True, eq=False)
class Curve:
    """Operating points of one fit: `bits` [points] per value, `excess` [points, sequences] nats, `tokens` [sequences]."""

    bits: np.ndarray
    excess: np.ndarray
    tokens: np.ndarray

    def losses(self, rows: np.ndarray | slice = slice(None)) -> np.ndarray:
        """ΔNLL of every point on the given sequences, nats per token."""
        return self.excess[:, rows].sum(1) / self.tokens[rows].sum()


def bits_at_loss(bits: np.ndarray, losses: np.ndarray, loss: float) -> float | None:
    """Bits per value at which a curve crosses `loss`; None where all points lie above it or all below."""
    order = np.argsort(bits)
    log_bits, fallen = np.log(bits[order]), falling(losses[order])
    if fallen[-1] > loss:  # a measured point within the loss counts, though noise at more bits hides it from the fall
        fallen = np.minimum.accumulate(losses[order])
    if fallen[0] <= loss or fallen[-1] > loss:
        return None
    after = int(np.argmax(fallen <= loss))
    high, low = fallen[after - 1], fallen[after]
    share = math.log(high / loss) / math.log(high / low) if low > 0 else (high - loss) / (high - low)
    return float(math.exp(log_bits[after - 1] + share * (log_bits[after] - log_bits[after - 1])))


def falling(y: np.ndarray) -> np.ndarray:
    """The falling sequence nearest to y in squares (Ayer et al. 1955)."""
    means: list[float] = []
    counts: list[int] = []
    for value in y.tolist():
        means.append(value)
        counts.append(1)
        while len(means) > 1 and means[-2] < means[-1]:
            count = counts[-2] + counts[-1]
            means[-2:] = [(means[-2] * counts[-2] + means[-1] * counts[-1]) / count]
            counts[-2:] = [count]
    return np.repeat(means, counts)


def median_of(each: Sequence[float | None]) -> tuple[float | None, int]:
    """The median over seeds, and how many of them cross: a seed without a crossing counts as more bits than any.

    Of an even number it is the larger of the two in the middle; None where that one has no crossing.
    """
    found = sorted(inf if bits is None else bits for bits in each)
    middle = found[len(found) // 2] if found else inf
    return None if middle == inf else middle, sum(bits is not None for bits in each)


def missing(curve: Curve, loss: float) -> str:
    """Why a curve has no crossing: which of its ends is nearest."""
    losses, order = curve.losses(), np.argsort(curve.bits)
    if falling(losses[order])[0] <= loss:
        return f"loses {losses[order[0]]:.4f} at its fewest, {curve.bits[order[0]]:.3g} bits"
    return f"loses {losses[order[-1]]:.4f} at its most, {curve.bits[order[-1]]:.3g} bits"


def crossing(
    curves: Sequence[Curve], loss: float, seed: int = 0
) -> tuple[list[float | None], float | None, Interval | None]:
    """Of curves of several seeds: the crossing of each, their geometric mean, and its 95 % interval.

    Where a seed has no crossing the median stands for the mean, without an interval.

    Sequences, the same for all seeds, and seeds are drawn anew. No interval where more than a twentieth of the draws have
    no crossing, and none of one point.
    """
    each = [bits_at_loss(curve.bits, curve.losses(), loss) for curve in curves]
    if None in each:
        return each, median_of(each)[0], None
    rng = np.random.default_rng(seed)
    sequences = len(curves[0].tokens)
    draws = []
    for _ in range(REPLICATES):
        rows = rng.integers(0, sequences, sequences)
        chosen = [curves[i] for i in rng.integers(0, len(curves), len(curves))]
        found = [bits_at_loss(curve.bits, curve.losses(rows), loss) for curve in chosen]
        if None not in found:
            draws.append(np.mean(np.log(found)))  # type: ignore[arg-type]
    mean = float(np.exp(np.mean(np.log(each))))  # type: ignore[arg-type]
    if len(draws) < 0.95 * REPLICATES:
        return each, mean, None
    low, high = np.exp(np.percentile(draws, [2.5, 97.5]))
    return each, mean, (float(low), float(high))
