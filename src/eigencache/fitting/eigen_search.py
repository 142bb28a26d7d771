"""Find the step of `eigen` for a size or for a loss, measured on held-out sequences."""

import math
from typing import NamedTuple

from eigencache.calibration.session import Session
from eigencache.codec.eigen.codec import EigenCodec
from eigencache.errors import BudgetError, CodecError, StatisticsError
from eigencache.fitting.eigen import EigenFit, Point
from eigencache.fitting.heldout_score import CONTEXT, expected_of, loss_of, score_held_out
from eigencache.records.fit import Expected

_CLOSE = 0.005  # relative tolerance of the bits
_ROUNDS = 30
_JUMP = 1e-3  # octaves between steps of sizes that differ by more than the tolerance: a class of coefficients comes or goes
_FINEST, _COARSEST = -20, 12  # octaves of the step from the spread of the vectors: the finest coefficients fit 32 bits
_OCTAVES = 4  # steps that are scored together for a loss, an octave apart
_FIRST = 1  # octaves of the coarsest of them in the first round
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
        max_nll: largest ΔNLL and largest KL, in nats per token. Give either `bits` or `max_nll`.
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


def at_bits(
    fit: EigenFit, bits: float, *, context: int = CONTEXT, name: str | None = None, tolerance: float = _CLOSE
) -> Point:
    """Return the codec that takes `bits` per value, within the tolerance, or the next smaller one where sizes jump.

    Args:
        fit: the fitted transform.
        bits: bits per value; sinks, window and headers are included.
        context: context length, in tokens, at which the size is evaluated.
        name: name of the codec; by default its settings.
        tolerance: relative tolerance of the bits. Every step that is tried fits quantizer and tables again.

    Raises:
        BudgetError: no step gives this size.
    """
    low = high = over = under = None  # octaves of a step with too many bits and of one with too few; log(bits / target)
    octaves, stride = _start(fit, bits * fit.layout.width)
    reached, smaller = math.inf, None
    for turn in range(_ROUNDS):
        try:
            point = fit.at_step(fit.spread * 2**octaves, name)
        except StatisticsError:
            high, under = octaves, None
        except CodecError:  # so fine that an outlier does not fit 32 bits
            low, over = octaves, None
        else:
            reached = fit.bits_per_value(point, context)
            excess = math.log(reached / bits)
            if abs(excess) < tolerance:
                return point
            if excess > 0:
                low, over = octaves, excess
            else:
                high, under, smaller = octaves, excess, point
        if low is None or high is None:
            farther = min(max(octaves + (stride if high is None else -stride), _FINEST), _COARSEST)
            if farther == octaves:
                break
            octaves, stride = farther, 2 * stride
        elif over is not None and under is not None and high - low < _JUMP:
            break
        elif over is not None and under is not None and turn % 3:  # the secant, now and then the middle
            octaves = low + (high - low) * min(max(over / (over - under), 0.02), 0.98)
        else:
            octaves = (low + high) / 2
    if smaller is not None and over is not None and under is not None:  # between the two
        return smaller
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


def _start(fit: EigenFit, coded_bits: float) -> tuple[float, float]:
    """Return the octaves of the step to begin with, and how far to go from there, from the steps that are fitted already."""
    known = sorted((math.log(bits), math.log2(step / fit.spread)) for step, bits in fit.sizes.items() if bits > 0)
    if len(known) < 2:
        return 0.0, 1.0
    above = [i for i, (bits, _) in enumerate(known) if bits > math.log(coded_bits)]
    i = min(max(above[0] if above else len(known) - 1, 1), len(known) - 1)
    (low, one), (high, other) = known[i - 1 : i + 1]
    share = (math.log(coded_bits) - low) / max(high - low, 1e-9)
    return min(max(one + share * (other - one), _FINEST), _COARSEST), 0.125


def at_loss(fit: EigenFit, session: Session, max_nll: float) -> Point:
    """Return the codec of the coarsest step within a loss, to a quarter of an octave.

    Args:
        fit: the fitted transform.
        session: the model and how it is run.
        max_nll: largest ΔNLL and largest KL on the held-out sequences, in nats per token.

    Raises:
        BudgetError: even the finest step loses more.
    """
    top, best, least = _FIRST, None, math.inf
    while _FINEST < top <= _COARSEST:
        points = _scored(fit, session, [fit.spread * 2.0 ** (top - i) for i in range(_OCTAVES)])
        within = [i for i in range(len(points)) if all(loss <= max_nll for _, loss in points[i:])]
        coarser = bool(points) and within[:1] == [0]  # all are within: a coarser step may be, too
        if within:
            best = points[within[0]][0]
        elif points:
            least = points[-1][1]
        if best is not None and (not coarser or top < _FIRST):
            break
        top += _OCTAVES if coarser else -_OCTAVES
    if best is None:
        raise BudgetError(
            f"`max_nll`={max_nll:g} nats cannot be met: the finest step loses {least:.4f} nats. Use a larger `max_nll`."
        )
    finer = [best.codec.step * 2 ** (i / (_BETWEEN + 1)) for i in range(_BETWEEN, 0, -1)]
    return next((p for p, loss in _scored(fit, session, finer) if loss <= max_nll), best)


def _scored(fit: EigenFit, session: Session, steps: list[float]) -> list[tuple[Point, float]]:
    """Return the codecs of these steps with their loss, without those too coarse to code anything or too fine."""
    points: dict[str, Point] = {}
    for step in steps:
        try:
            points[f"{step:g}"] = fit.at_step(step)
        except (StatisticsError, CodecError):
            continue
    if not points:
        return []
    codecs = {name: point.codec for name, point in points.items()}
    quality = score_held_out(session, fit.held_out, codecs)
    return [(point, loss_of(quality[name])) for name, point in points.items()]
