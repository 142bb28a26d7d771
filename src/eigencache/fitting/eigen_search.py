"""Find the step of `eigen` for a size or for a loss, measured on held-out sequences."""

import math
from typing import NamedTuple

from eigencache.calibration.session import Session
from eigencache.codec.eigen.codec import EigenCodec
from eigencache.errors import BudgetError, StatisticsError
from eigencache.fitting.eigen import EigenFit, Point
from eigencache.fitting.heldout_score import CONTEXT, expected_of, score_held_out
from eigencache.records.fit import Expected

_CLOSE = 0.005  # relative tolerance of the bits
_ROUNDS = 20
_OCTAVES = 9  # octaves of steps that are scored together for a loss
_BETWEEN = 3  # steps that are scored between two octaves


class Fitted(NamedTuple):
    """A codec with its size and its loss, both measured on the held-out sequences."""

    codec: EigenCodec
    expected: Expected


def fit_target(
    fit: EigenFit, session: Session, *, bits: float | None = None, max_nll: float | None = None, context: int = CONTEXT
) -> Fitted:
    """Return the codec of a size, or the smallest codec within a loss.

    Args:
        fit: the fitted transform.
        session: the model and how it is run.
        bits: bits per value at `context` tokens.
        max_nll: largest increase of the NLL, in nats per token. Give either `bits` or `max_nll`.
        context: context length, in tokens, at which a size is evaluated.

    Raises:
        BudgetError: neither or both targets are given, or the target cannot be met.
    """
    if (bits is None) == (max_nll is None):
        raise BudgetError("Give exactly one of `bits` and `max_nll`.")
    if bits is not None:
        point = at_bits(fit, bits, context=context)
    else:
        assert max_nll is not None
        point = at_loss(fit, session, max_nll)
    quality = score_held_out(session, fit.held_out, {"fitted": point.codec})["fitted"]
    return Fitted(point.codec, expected_of(quality, context, fit.bits_per_value(point, context), point.coded_bits))


def at_bits(fit: EigenFit, bits: float, *, context: int = CONTEXT, name: str | None = None) -> Point:
    """Return the codec that takes `bits` per value, to half a percent.

    Args:
        fit: the fitted transform.
        bits: bits per value; sinks, window and headers are included.
        context: context length, in tokens, at which the size is evaluated.
        name: name of the codec; by default its settings.

    Raises:
        BudgetError: no step gives this size.
    """
    low, high = math.log(_finest(fit)), math.log(_coarsest(fit))  # logarithms of the step: too many bits, too few
    over = under = None  # log(bits at `low` / target), log(bits at `high` / target)
    reached = math.inf
    for turn in range(_ROUNDS):
        middle = (low + high) / 2
        if over is not None and under is not None and turn % 3:  # the secant, now and then the middle
            middle = low + (high - low) * min(max(over / (over - under), 0.02), 0.98)
        try:
            point = fit.at_step(math.exp(middle), name)
        except StatisticsError:
            high = middle
            continue
        reached = fit.bits_per_value(point, context)
        excess = math.log(reached / bits)
        if abs(excess) < _CLOSE:
            return point
        low, over, high, under = (middle, excess, high, under) if excess > 0 else (low, over, middle, excess)
    if math.isinf(reached):
        raise BudgetError(
            f"`bits`={bits:g} cannot be met: no step codes anything, as the vectors of the fit do not vary. Use other text."
        )
    limit, remedy = ("below the minimum", "or more") if bits < reached else ("above the maximum", "or less")
    shorter = ", or fewer `sinks` and a shorter `window`" if bits < reached else ""
    raise BudgetError(
        f"`bits`={bits:g} is {limit} of {reached:.3g} bits per value at a context of {context:,} tokens. "
        f"Use {reached:.3g} {remedy}{shorter}."
    )


def at_loss(fit: EigenFit, session: Session, max_nll: float) -> Point:
    """Return the codec of the coarsest step within a loss, to a quarter of an octave.

    Args:
        fit: the fitted transform.
        session: the model and how it is run.
        max_nll: largest ΔNLL on the held-out sequences, in nats per token.

    Raises:
        BudgetError: even the finest step loses more.
    """
    for first in (1, 1 + _OCTAVES):
        octaves = [_coarsest(fit) / 2**i for i in range(first, first + _OCTAVES)]
        points = _scored(fit, session, octaves)
        within = [i for i in range(len(points)) if all(loss <= max_nll for _, loss in points[i:])]
        if within:
            break
    else:
        least = points[-1][1]
        raise BudgetError(
            f"`max_nll`={max_nll:g} nats cannot be met: the finest step loses {least:.4f} nats. Use a larger `max_nll`."
        )
    best = points[within[0]][0]
    finer = [best.codec.step * 2 ** (i / (_BETWEEN + 1)) for i in range(_BETWEEN, 0, -1)]
    return next((p for p, loss in _scored(fit, session, finer) if loss <= max_nll), best)


def _scored(fit: EigenFit, session: Session, steps: list[float]) -> list[tuple[Point, float]]:
    """Return the codecs of these steps with their ΔNLL. Steps too coarse to code anything are left out."""
    points: dict[str, Point] = {}
    for step in steps:
        try:
            points[f"{step:g}"] = fit.at_step(step)
        except StatisticsError:
            continue
    codecs = {name: point.codec for name, point in points.items()}
    quality = score_held_out(session, fit.held_out, codecs)
    return [(point, quality[name].delta_nll) for name, point in points.items()]


def _coarsest(fit: EigenFit) -> float:
    """Return a step at which hardly more than the largest coefficient is coded."""
    return 2 * math.sqrt(float(fit.eigenvalues.max()))


def _finest(fit: EigenFit) -> float:
    """Return a step too fine to save bytes, at which the largest coefficients still fit integers of 32 bits."""
    return max(math.sqrt(float(fit.eigenvalues.median())) / 2**8, math.sqrt(float(fit.eigenvalues.max())) / 2**20)
