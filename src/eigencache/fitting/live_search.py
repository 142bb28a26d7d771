"""The widths of a live codec for a size, for a loss, or for safety, found on sequences that nothing was fitted on."""

import math
from typing import NamedTuple

from eigencache.calibration.session import Session
from eigencache.codec.live.codec import LiveCodec
from eigencache.codec.saved.card import Expected
from eigencache.corpora.sequences import Sequences
from eigencache.errors import BudgetError, StatisticsError
from eigencache.fitting.heldout_score import CONTEXT, DEFAULT_MAX_NLL, expected_of, score_held_out
from eigencache.fitting.live import LiveFit
from eigencache.kernels.packed.format import BLOCK

TRIED = (1.5, 1.75, 2, 2.25, 2.5, 2.75, 3, 3.25, 3.5, 4, 5, 6, 8)  # bits per value, for a loss


class FittedLive(NamedTuple):
    """A codec with its size at `context` tokens and its loss, both measured on the sequences kept apart."""

    codec: LiveCodec
    expected: Expected


def fit_live_target(
    fit: LiveFit,
    session: Session,
    apart: Sequences,
    *,
    bits: float | None = None,
    max_nll: float | None = None,
    safe: bool = False,
    context: int = CONTEXT,
) -> FittedLive:
    """The codec of `bits` per packed value, the safe one, or the smallest that loses at most `max_nll` nats (0.01).

    Raises `BudgetError` where several are asked for, and where even 8 bits lose more.
    """
    if sum((bits is not None, max_nll is not None, safe)) > 1:
        raise BudgetError("give one of a number of bits, a loss and safe, not several")
    limit = DEFAULT_MAX_NLL if max_nll is None else max_nll
    if not 0 < limit < math.inf:
        raise BudgetError(f"`max_nll` {limit:g}: must be a number above 0")
    kept = fit.sinks + fit.settings.window
    if apart.corpus.max_length // 2 < kept + BLOCK:
        raise StatisticsError(
            f"behind prefixes of half of {apart.corpus.max_length} tokens no block of {BLOCK} is packed, {kept} being kept "
            f"apart: raise `max_length` to {2 * (kept + BLOCK)} at least"
        )
    one = fit.safe() if safe else None if bits is None else fit.at_bits(bits)
    tried = [one] if one else [fit.at_bits(b) for b in TRIED]
    names = {f"{codec.bits_per_value:.4f}": codec for codec in tried}
    quality = score_held_out(session, apart, names)
    if one:
        name = next(iter(names))
    else:
        ordered = sorted(names, key=float)
        within = [i for i in range(len(ordered)) if all(quality[n].delta_nll <= limit for n in ordered[i:])]
        if not within:
            raise BudgetError(f"`max_nll` {limit:g}: even 8 bits lose {quality[ordered[-1]].delta_nll:.4f} nats: allow more")
        name = ordered[within[0]]
    codec = names[name]
    values = session.loaded.geometry.values_per_token
    return FittedLive(
        codec,
        expected_of(
            quality[name], context, 8 * codec.nbytes_of(context) / (context * values), codec.bits_per_value * values
        ),
    )
