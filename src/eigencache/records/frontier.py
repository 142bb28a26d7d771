"""Rates at equal loss: interpolate the operating points of a method, and find where the curve crosses a loss.

Bits are interpolated on a logarithmic scale, losses too if both are positive. Noise can make a loss rise with the bits;
the curve is first made monotone (pool adjacent violators). Nothing is extrapolated.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from math import inf

import numpy as np

from eigencache.records.base import Interval

REPLICATES = 1000  # bootstrap draws


@dataclass(frozen=True, eq=False)
class Curve:
    """The operating points of one fit."""

    bits: np.ndarray  # [points], per value
    excess: np.ndarray  # [points, sequences], nats above the uncompressed cache
    tokens: np.ndarray  # [sequences], scored

    def losses(self, rows: np.ndarray | slice = slice(None)) -> np.ndarray:
        """Return the ΔNLL of every point on the sequences `rows`, in nats per token: [points]."""
        return self.excess[:, rows].sum(1) / self.tokens[rows].sum()


def bits_at_loss(bits: np.ndarray, losses: np.ndarray, loss: float) -> float | None:
    """Return the bits per value at which a curve crosses a loss.

    Args:
        bits: Bits per value [points].
        losses: Losses of the same points [points].
        loss: The loss to cross.

    Returns:
        The interpolated bits; None if all points lie above `loss`, or all below.
    """
    order = np.argsort(bits)
    log_bits, monotone = np.log(bits[order]), falling(losses[order])
    if monotone[-1] > loss:  # a point within the loss counts even if noise at more bits hides it in the monotone curve
        monotone = np.minimum.accumulate(losses[order])
    if monotone[0] <= loss or monotone[-1] > loss:
        return None
    after = int(np.argmax(monotone <= loss))
    high, low = monotone[after - 1], monotone[after]
    share = math.log(high / loss) / math.log(high / low) if low > 0 else (high - loss) / (high - low)
    return float(math.exp(log_bits[after - 1] + share * (log_bits[after] - log_bits[after - 1])))


def falling(y: np.ndarray) -> np.ndarray:
    """Return the non-increasing sequence nearest to y in least squares (Ayer et al. 1955)."""
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
    """Return the median over seeds, and the number of seeds with a crossing.

    Args:
        each: Bits per value of every seed; None, for no crossing, counts as more bits than any.

    Returns:
        The median, for an even number of seeds the larger of the two in the middle, or None if it has no crossing; and
        the number of seeds with a crossing.
    """
    ordered = sorted(inf if bits is None else bits for bits in each)
    middle = ordered[len(ordered) // 2] if ordered else inf
    return None if middle == inf else middle, sum(bits is not None for bits in each)


def missing(curve: Curve, loss: float) -> str:
    """Return the reason why a curve has no crossing: the loss at its nearest end."""
    losses, order = curve.losses(), np.argsort(curve.bits)
    if falling(losses[order])[0] <= loss:
        return f"loses {losses[order[0]]:.4f} at its fewest, {curve.bits[order[0]]:.3g} bits"
    return f"loses {losses[order[-1]]:.4f} at its most, {curve.bits[order[-1]]:.3g} bits"


def crossing(
    curves: Sequence[Curve], loss: float, seed: int = 0
) -> tuple[list[float | None], float | None, Interval | None]:
    """Return the crossing of every seed, their geometric mean, and its 95 % interval.

    The interval is a bootstrap over seeds and over sequences, which are the same for all seeds.

    Args:
        curves: One curve per seed.
        loss: The loss to cross, in nats per token.
        seed: Seed of the bootstrap.

    Returns:
        The crossing of every seed, or None; the geometric mean, or the median if a seed has no crossing; the interval, or
        None if a seed, or more than a twentieth of the draws, has no crossing.
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
        crossings = [bits_at_loss(curve.bits, curve.losses(rows), loss) for curve in chosen]
        if None not in crossings:
            draws.append(np.mean(np.log(crossings)))  # type: ignore[arg-type]
    mean = float(np.exp(np.mean(np.log(each))))  # type: ignore[arg-type]
    if len(draws) < 0.95 * REPLICATES:
        return each, mean, None
    low, high = np.exp(np.percentile(draws, [2.5, 97.5]))
    return each, mean, (float(low), float(high))
