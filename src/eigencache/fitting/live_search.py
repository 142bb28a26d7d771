"""Find the bit widths of a live codec for a rate or for a loss, measured on held-out sequences."""

import math
from typing import NamedTuple

from eigencache.calibration.session import Session
from eigencache.codec.live.codec import LiveCodec
from eigencache.corpora.sequences import Sequences
from eigencache.errors import BudgetError
from eigencache.fitting.heldout_score import CONTEXT, DEFAULT_MAX_NLL, expected_of, loss_of, score_held_out
from eigencache.fitting.limits import check_packed_block
from eigencache.fitting.live import SAFE, LiveFit
from eigencache.records.fit import Expected

TRIED = (1.5, 1.75, 2, 2.25, 2.5, 2.75, 3, 3.25, 3.5, 4, 5, 6, 8)  # rates, in bits per value, that are scored for a loss


class FittedLive(NamedTuple):
    """A live codec with its size and its loss on the held-out sequences."""

    codec: LiveCodec
    expected: Expected


def fit_live_target(
    fit: LiveFit,
    session: Session,
    held_out: Sequences,
    *,
    bits: float | None = None,
    max_nll: float | None = None,
    safe: bool = False,
    context: int = CONTEXT,
) -> FittedLive:
    """Return the live codec of a rate, the safe one, or the smallest within a loss. At most one of the three is given.

    Args:
        fit: the fitted transforms.
        session: the model and how it is run.
        held_out: sequences that the loss is measured on.
        bits: bits per packed value.
        max_nll: largest ΔNLL and largest KL, in nats per token; 0.01 by default.
        safe: take the codec of 6.9 bits per packed value.
        context: context length, in tokens, at which the size is evaluated.

    Raises:
        BudgetError: several targets are given, or even 8 bits lose more than `max_nll`.
        StatisticsError: the sequences are too short for one packed block.
    """
    if sum((bits is not None, max_nll is not None, safe)) > 1:
        raise BudgetError("Give only one of `bits`, `max_nll` and `safe`.")
    limit = DEFAULT_MAX_NLL if max_nll is None else max_nll
    if not 0 < limit < math.inf:
        raise BudgetError(f"`max_nll`={limit:g} must be a number above 0.")
    check_packed_block(held_out, fit.sinks + fit.settings.window)
    rates = (SAFE,) if safe else TRIED if bits is None else (bits,)
    codecs = [(rate, fit.safe() if safe else fit.at_bits(rate)) for rate in rates]
    tried = {f"{codec.bits_per_value:.4f}": (rate, codec) for rate, codec in codecs}
    quality = score_held_out(session, held_out, {name: codec for name, (_, codec) in tried.items()})
    if len(rates) == 1:
        name = next(iter(tried))
    else:
        ordered = sorted(tried, key=float)
        within = [i for i in range(len(ordered)) if all(loss_of(quality[n]) <= limit for n in ordered[i:])]
        if not within:
            least = loss_of(quality[ordered[-1]])
            raise BudgetError(
                f"`max_nll`={limit:g} nats cannot be met: 8 bits lose {least:.4f} nats. Use a larger `max_nll`."
            )
        name = ordered[within[0]]
    rate, codec = tried[name]
    values = session.loaded.geometry.values_per_token
    return FittedLive(
        codec,
        expected_of(
            quality[name],
            context,
            8 * codec.nbytes_of(context) / (context * values),
            codec.bits_per_value * values,
            fit.saturated(rate),
            chosen_by_loss=len(rates) > 1,
        ),
    )
