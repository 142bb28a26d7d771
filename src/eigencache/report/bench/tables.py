"""Methods at equal loss, as tables: what each holds at a loss, and every operating point behind it."""

from collections.abc import Sequence
from math import inf

import numpy as np

from eigencache.records.bench import BenchRecord, EqualLoss
from eigencache.records.frontier import bits_at_loss, median_of
from eigencache.records.quality import Quality
from eigencache.report.core.measured import ABSENT
from eigencache.report.core.table import Table
from eigencache.report.quality.evaluation import divergence_table, retrieval_table
from eigencache.report.quality.sweep_table import interval_cell

DIVERGENCES = (0.003, 0.01, 0.03, 0.1)  # nats
HELD_ONCE = ("Held once (MB)", "Paid back at (tokens)")
_AT = 0.03  # nats of KL: the operating point whose bytes held once are shown
ONCE_NOTE = (
    f"Held once: bases, means, tables, on top of all bits, of the point nearest to a KL of {_AT:g}; paid back: the tokens "
    "whose saved bytes are as many."
)


def frontier_table(record: BenchRecord, context: int) -> Table:
    """One row per method: bits per value at each loss with interval, the ratio to 16 bits, fewest bits first."""
    own = [one for one in record.equal_loss if one.context == context]
    losses = sorted({one.delta_nll for one in own})
    methods = sorted(
        dict.fromkeys(one.method for one in own), key=lambda m: _order(record, [o for o in own if o.method == m])
    )
    columns = ("Method", *(f"Bits at ΔNLL {x:g}" for x in losses), *(f"Ratio at {x:g}" for x in losses), *HELD_ONCE)
    rows = []
    for method in methods:
        at = {one.delta_nll: one for one in own if one.method == method}
        bits = [_bits(record, at[loss]) for loss in losses]
        ratios = [f"{significant(16 / b, None)} x" if (b := median_of(at[loss].by_seed)[0]) else ABSENT for loss in losses]
        rows.append((method, *bits, *ratios, *held_once(record, method, context)))
    rows += [(method, *(ABSENT for _ in columns[1:])) for method in record.refused]
    return Table(
        f"{record.model.name}, {context:,} tokens held: bits per value at equal loss",
        columns,
        tuple(rows),
        notes=frontier_notes(record, context),
        warnings=tuple(record.warnings),
    )


def frontier_notes(record: BenchRecord, context: int) -> tuple[str, ...]:
    """How the figures came about, for the foot of a table."""
    corpus, seeds = record.corpora[context], sorted({p.seed for p in record.points})
    return (
        f"{corpus.name}: {context:,} tokens held, the next {record.scored} read{_in_steps(record)} and all but the first of "
        f"them scored, in "
        f"{corpus.sequences} sequences; {record.uncompressed_nll[context]:.4f} nats per token uncompressed. "
        f"Fitted on {record.calibration.name}, {record.run.settings['calibration_tokens']:,} tokens, "
        f"seeds {', '.join(map(str, seeds))}.",
        "Bits: all bytes held, sinks, window, scales and headers included, the basis apart, over the numbers of "
        f"{'latent and rotary key' if record.model.geometry.mla else 'K and V'}; read off each method's interpolated curve. "
        "Intervals: 95 %, bootstrap over sequences and seeds; no interval where a twentieth of the draws have no crossing. "
        "k of n seeds: the median, seeds without a crossing counted as more bits than any. <: the method's fewest bits lose "
        "less; >: the most bits that were measured lose more in half of the seeds. " + ONCE_NOTE,
        *(f"{method}: not for this model: {why}." for method, why in record.refused.items()),
        f"Machine: {record.run.machine}.",
    )


def _in_steps(record: BenchRecord) -> str:
    return f" {record.step} at a time, each piece behind everything before it held," if record.step else ""


def divergence_bits(record: BenchRecord, method: str, context: int, kl: float) -> tuple[str, float]:
    """Bits per value at a KL to the uncompressed model, a mean over seeds; `<` the method's fewest bits, `>` its most.

    `ABSENT` and infinity for a method that was not measured.

    KL cannot be bought below zero as ΔNLL can, by an error that happens to help; it needs fewer tokens to be known.
    """
    found: list[float | None] = []
    ends: list[tuple[str, float]] = []
    for seed in sorted({p.seed for p in record.points if p.method == method and p.context == context}):
        own = [p for p in record.points if (p.method, p.context, p.seed) == (method, context, seed)]
        bits, losses = np.array([p.bits_per_value for p in own]), np.array([p.quality.kl for p in own])
        at = bits_at_loss(bits, losses, kl)
        ends.append(("<", float(bits.min())) if losses[bits.argmin()] <= kl else (">", float(bits.max())))
        found.append(at)
    median = median_of(found)[0]
    if median is None:
        return next((end for end, at in zip(ends, found, strict=True) if at is None), (ABSENT, inf))
    return "", float(np.exp(np.mean(np.log(found)))) if None not in found else median  # type: ignore[arg-type]


def divergences_table(record: BenchRecord, context: int) -> Table:
    """One row per method: bits per value at equal KL to the uncompressed model, fewest first."""
    columns = (
        "Method",
        *(f"Bits at KL {kl:g}" for kl in DIVERGENCES),
        *(f"Ratio at {kl:g}" for kl in DIVERGENCES),
        *HELD_ONCE,
    )
    at = {
        method: [divergence_bits(record, method, context, kl) for kl in DIVERGENCES]
        for method in dict.fromkeys(p.method for p in record.points if p.context == context)
    }
    order = sorted(
        at, key=lambda method: [inf if sign == ">" else bits for sign, bits in (at[method][i] for i in (2, 1, 3, 0))]
    )
    rows = tuple(
        (
            method,
            *(f"{sign} {bits:.3g}".strip() for sign, bits in at[method]),
            *(ABSENT if sign else f"{16 / bits:.1f} x" for sign, bits in at[method]),
            *held_once(record, method, context),
        )
        for method in order
    )
    notes = (
        "KL(uncompressed ‖ compressed) in nats per token, over the same tokens. <: the method's fewest bits diverge less; "
        ">: its most diverge more. " + ONCE_NOTE,
    )
    return Table(f"{record.model.name}, {context:,} tokens held: bits per value at equal KL", columns, rows, notes=notes)


def held_once(record: BenchRecord, method: str, context: int) -> tuple[str, str]:
    """Cells of `HELD_ONCE`, of the point of a method that is nearest to a KL of 0.03."""
    own = [p.quality for p in record.points if (p.method, p.context) == (method, context)]
    return _once(min(own, key=lambda q: abs(np.log(max(q.kl, 1e-9) / _AT)))) if own else (ABSENT, ABSENT)


def _once(quality: Quality) -> tuple[str, str]:
    tokens = quality.paid_back_at
    return f"{quality.basis_nbytes / 1e6:.2f}", "never" if tokens is None else f"{tokens:,}"


def points_table(record: BenchRecord, context: int) -> Table:
    """Every operating point of every seed: bits, loss with interval, KL, agreement, basis."""
    columns = ("Method", "Point", "Seed", "Bits", "Ratio", "ΔNLL (nats)", "KL (nats)", "Top-1", *HELD_ONCE)
    rows = [
        (
            p.method,
            p.point,
            f"{p.seed}",
            f"{p.bits_per_value:.3f}",
            f"{p.quality.compression_ratio:.2f}",
            interval_cell(p.quality),
            f"{p.quality.kl:.4f}",
            f"{100 * p.quality.top1_agreement:.1f} %",
            *_once(p.quality),
        )
        for p in record.points
        if p.context == context
    ]
    return Table(
        f"{record.model.name}, {context:,} tokens held: every point", columns, tuple(rows), words=frozenset({"Point"})
    )


def against_table(records: Sequence[BenchRecord], method: str) -> Table:
    """How many times the bits of `method` each other one holds at equal loss, model by model."""
    losses = sorted({one.delta_nll for record in records for one in record.equal_loss})
    columns = ("Method", *(f"{r.model.name} {c:,} at {loss:g}" for r in records for c in r.corpora for loss in losses))
    names = list(dict.fromkeys(one.method for record in records for one in record.equal_loss if one.method != method))
    rows = []
    for name in names:
        cells = [
            _times(record, _found(record, method, context, loss), _found(record, name, context, loss))
            for record in records
            for context in record.corpora
            for loss in losses
        ]
        rows.append((name, *cells))
    notes = (f"Bits of each method over those of {method} at the same ΔNLL; >: the most bits that were measured lose more.",)
    return Table(f"Bits at equal ΔNLL, in units of {method}", columns, tuple(rows), notes=notes)


def against_by_divergence_table(records: Sequence[BenchRecord], method: str) -> Table:
    """The same at equal KL."""
    places = [(record, context, kl) for record in records for context in record.corpora for kl in DIVERGENCES]
    columns = ("Method", *(f"{record.model.name} {context:,} at {kl:g}" for record, context, kl in places))
    names = dict.fromkeys(p.method for record in records for p in record.points if p.method != method)
    rows = []
    for name in names:
        cells = []
        for place in places:
            (unknown, own), (sign, other) = (divergence_bits(place[0], m, *place[1:]) for m in (method, name))
            cells.append(ABSENT if unknown or sign == "<" else sign or f"{other / own:.2f}")
        rows.append((name, *cells))
    notes = (f"Bits of each method over those of {method} at the same KL; >: the most bits that were measured lose more.",)
    return Table(f"Bits at equal KL, in units of {method}", columns, tuple(rows), notes=notes)


def generation_tables(record: BenchRecord) -> list[Table]:
    """Generation and retrieval of each method's cheapest point within a KL of 0.03 nats, where they were measured."""
    tables = []
    if record.divergence:
        tables.append(divergence_table(record))
    if record.retrieval:
        tables.append(retrieval_table(record))
    return tables


def _order(record: BenchRecord, own: Sequence[EqualLoss]) -> tuple[float, ...]:
    """What a method holds at the usual loss and then at the others, at most; infinity where it never gets there."""
    at_most = []
    for one in own:
        bits, _ = median_of(one.by_seed)
        at_most.append(bits or (_ends(record, one)[0] if _is_below(record, one) else inf))
    return tuple(bits for _, bits in sorted(zip((abs(one.delta_nll - 0.03) for one in own), at_most, strict=True)))


def _bits(record: BenchRecord, one: EqualLoss) -> str:
    """A cell: bits with their interval, or with how many seeds cross, or the end of the curve that is not reached."""
    median, crossed = median_of(one.by_seed)
    if median is None:
        fewest, most = _ends(record, one)
        end = f"< {fewest:.3g}" if _is_below(record, one) else f"> {most:.3g}"
        return f"{end} ({crossed} of {len(one.by_seed)} seeds)" if crossed else end
    if crossed < len(one.by_seed):
        return f"{significant(median, None)} ({crossed} of {len(one.by_seed)} seeds)"
    bits = one.bits_per_value or median
    if one.interval is None:
        return f"{significant(bits, None)} (no interval)"
    return f"{significant(bits, one.interval)} [{one.interval[0]:.2g}, {one.interval[1]:.2g}]"


def significant(value: float, interval: tuple[float, float] | None) -> str:
    """A number with the digits that its interval carries: three where it is within 3 % of the value, else two."""
    narrow = interval is not None and interval[1] - interval[0] < 0.06 * abs(value)
    return f"{value:.3g}" if narrow else f"{value:.2g}"


def _ends(record: BenchRecord, one: EqualLoss) -> tuple[float, float]:
    """The fewest and the most bits that were measured of a method."""
    bits = [p.bits_per_value for p in record.points if (p.method, p.context) == (one.method, one.context)]
    return (min(bits), max(bits)) if bits else (inf, inf)


def _is_below(record: BenchRecord, one: EqualLoss) -> bool:
    """Whether a method loses less than asked for at its fewest bits, in most seeds."""
    own = [p for p in record.points if (p.method, p.context) == (one.method, one.context)]
    below = []
    for seed in {p.seed for p in own}:
        fewest = min((p for p in own if p.seed == seed), key=lambda p: p.bits_per_value)
        below.append(fewest.quality.delta_nll <= one.delta_nll)
    return 2 * sum(below) > len(below)


def _found(record: BenchRecord, method: str, context: int, loss: float) -> EqualLoss | None:
    found = (o for o in record.equal_loss if (o.method, o.context, o.delta_nll) == (method, context, loss))
    return next(found, None)


def _times(record: BenchRecord, own: EqualLoss | None, other: EqualLoss | None) -> str:
    if own is None or other is None or (bits := median_of(own.by_seed)[0]) is None:
        return ABSENT
    if (others := median_of(other.by_seed)[0]) is None:
        return ABSENT if _is_below(record, other) else ">"
    return f"{others / bits:.2g}"
