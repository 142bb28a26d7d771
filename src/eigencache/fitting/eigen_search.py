"""Find the step of `eigen` for a size or for a loss, measured on held-out sequences."""

import math
from contextlib import suppress
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
_ROUGHLY = 0.03  # of the bits: how near the search in the pilot comes
_NEAR = 0.5  # of log(bits): how near the sizes of known steps must be on both sides to need no pilot
_NEWTON = 3  # turns that follow the slope
_FLATTEST, _USUAL = -0.05, -0.5  # slopes, log(bits) per octave: of the smallest magnitude, and where one size is known
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
    bits_per_value = fit.bits_per_value(point, context)
    expected = expected_of(
        quality, context, bits_per_value, point.coded_bits, point.escaped, chosen_by_loss=max_nll is not None
    )
    return Fitted(point.codec, expected)


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
    octaves, stride, slope = _start(fit, bits, context)
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
            excess = over if high is None else under
            move = stride if high is None else -stride
            if turn < _NEWTON and slope and excess is not None:
                move = min(max(-excess / slope, -1.0), 1.0)
            farther = min(max(octaves + move, _FINEST), _COARSEST)
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
        f"`bits`={bits:g} (a ratio of {16 / bits:,.1f}) is {limit} of {reached:.3g} bits per value at a context of "
        f"{context:,} tokens. Use {reached:.3g} {remedy}{shorter}."
    )


def _start(fit: EigenFit, bits: float, context: int) -> tuple[float, float, float | None]:
    """Return where to search: octaves of the step, how far to go from there, and the change of log(bits) per octave.

    Steps that are fitted already tell, if the bits of some are near. If not, the pilot does, which is searched first.
    """
    wanted, known = math.log(bits * fit.layout.width), _known(fit)
    near = [size for _, size in known if abs(size - wanted) < _NEAR]
    if (not near or min(near) > wanted or max(near) < wanted) and fit.pilot is not None:
        with suppress(BudgetError):
            at_bits(fit.pilot, bits, context=context, tolerance=_ROUGHLY)
        pilot = _known(fit.pilot)
        if len(pilot) == 1:
            known = pilot
        elif pilot:
            bias = [size - _between(pilot, octaves)[0] for octaves, size in known]
            shift = sum(bias) / len(bias) if bias else 0.0
            known = [(octaves, size + shift) for octaves, size in pilot]
    if not known:
        return 0.0, 1.0, None
    if len(known) == 1:
        return known[0][0], 0.125, _USUAL
    by_size = sorted((size, octaves) for octaves, size in known)
    octaves, _ = _between(by_size, wanted)
    slope = _between(known, octaves)[1]
    return min(max(octaves, _FINEST), _COARSEST), 0.125, min(slope, _FLATTEST)


def _known(fit: EigenFit) -> list[tuple[float, float]]:
    """Return octaves of the step and log(bits) of a coded token of the steps that were fitted, finest first."""
    return sorted((math.log2(step / fit.spread), math.log(bits)) for step, bits in fit.sizes.items() if bits > 0)


def _between(points: list[tuple[float, float]], x: float) -> tuple[float, float]:
    """Return y and the slope at x on the line through the two neighbors of x, or the last two on its side."""
    right = min(max(sum(p <= x for p, _ in points), 1), len(points) - 1)
    (a, b), (c, d) = points[right - 1 : right + 1]
    slope = (d - b) / max(c - a, 1e-9)
    return b + slope * (x - a), slope


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
