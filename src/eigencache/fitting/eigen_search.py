"""The step of `eigen` for a size or for a loss, found on sequences that nothing was fitted on."""

import math
from typing import NamedTuple

from eigencache.calibration.session import Session
from eigencache.codec.eigen.codec import EigenCodec
from eigencache.codec.saved.card import Expected
from eigencache.errors import BudgetError, StatisticsError
from eigencache.fitting.eigen import EigenFit, Point
from eigencache.fitting.heldout_score import CONTEXT, expected_of, score_held_out

_CLOSE = 0.005  # of the bits that were asked for
_ROUNDS = 20
_OCTAVES = 9  # of steps that are looked at for a loss
_BETWEEN = 3  # steps that are looked at between two octaves


class Fitted(NamedTuple):
    """A codec with its size at `context` tokens and its loss, both measured on the sequences kept apart."""

    codec: EigenCodec
    expected: Expected


def fit_target(
    fit: EigenFit, session: Session, *, bits: float | None = None, max_nll: float | None = None, context: int = CONTEXT
) -> Fitted:
    """The codec of `bits` per value of `context` tokens, or else the smallest that loses at most `max_nll` nats.

    Raises `BudgetError` where neither or both are given, and where the target cannot be met.
    """
    if (bits is None) == (max_nll is None):
        raise BudgetError("give one of a number of bits, a ratio and a loss, not several and not none")
    if bits is not None:
        point = at_bits(fit, bits, context=context)
    else:
        assert max_nll is not None
        point = at_loss(fit, session, max_nll)
    quality = score_held_out(session, fit.held_out, {"fitted": point.codec})["fitted"]
    return Fitted(point.codec, expected_of(quality, context, fit.bits_per_value(point, context), point.coded_bits))


def at_bits(fit: EigenFit, bits: float, *, context: int = CONTEXT, name: str | None = None) -> Point:
    """The codec that takes `bits` per value of `context` tokens, sinks, window and headers counted, to half a percent.

    Raises `BudgetError` where no step does.
    """
    low, high = math.log(_finest(fit)), math.log(_coarsest(fit))  # of the step: too many bits, too few
    over = under = None  # log of bits there, over what was asked for
    found = math.inf
    for turn in range(_ROUNDS):
        middle = (low + high) / 2
        if over is not None and under is not None and turn % 3:  # the secant, now and then the middle
            middle = low + (high - low) * min(max(over / (over - under), 0.02), 0.98)
        try:
            point = fit.at_step(math.exp(middle), name)
        except StatisticsError:
            high = middle
            continue
        found = fit.bits_per_value(point, context)
        excess = math.log(found / bits)
        if abs(excess) < _CLOSE:
            return point
        low, over, high, under = (middle, excess, high, under) if excess > 0 else (low, over, middle, excess)
    raise BudgetError(
        f"{bits:g} bits per value of {context:,} tokens cannot be had, {found:.3g} can: "
        "ask for another number, or keep fewer `sinks` and a shorter `window`"
    )


def at_loss(fit: EigenFit, session: Session, max_nll: float) -> Point:
    """The coarsest step whose ΔNLL on the sequences kept apart is at most `max_nll` nats, to a quarter of an octave.

    Raises `BudgetError` where even the finest step loses more.
    """
    for first in (1, 1 + _OCTAVES):
        octaves = [_coarsest(fit) / 2**i for i in range(first, first + _OCTAVES)]
        points = _scored(fit, session, octaves)
        within = [i for i in range(len(points)) if all(loss <= max_nll for _, loss in points[i:])]
        if within:
            break
    else:
        raise BudgetError(f"`max_nll` {max_nll:g}: even the finest step loses {points[-1][1]:.4f} nats: allow more")
    best = points[within[0]][0]
    finer = [best.codec.step * 2 ** (i / (_BETWEEN + 1)) for i in range(_BETWEEN, 0, -1)]
    return next((p for p, loss in _scored(fit, session, finer) if loss <= max_nll), best)


def _scored(fit: EigenFit, session: Session, steps: list[float]) -> list[tuple[Point, float]]:
    """Codecs of these steps, those left out that code nothing, with their ΔNLL."""
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
    """A step at which hardly anything but the largest coefficient is coded."""
    return 2 * math.sqrt(float(fit.eigenvalues.max()))


def _finest(fit: EigenFit) -> float:
    """A step at which no codec is worth its bytes, and the largest coefficients are still integers of 32 bits."""
    return max(math.sqrt(float(fit.eigenvalues.median())) / 2**8, math.sqrt(float(fit.eigenvalues.max())) / 2**20)
