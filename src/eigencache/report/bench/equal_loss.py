"""Tables of the rate that each method needs for a given ΔNLL."""

from collections.abc import Sequence
from math import inf

from eigencache.records.bench import BenchRecord, EqualLoss
from eigencache.report.bench.points import SIDE_INFORMATION, SIDE_INFORMATION_NOTE, side_information_cells
from eigencache.report.core.measured import ABSENT
from eigencache.report.core.table import Table

_USUAL = 0.03  # nats; methods are sorted by their rate at this ΔNLL
RELATIVE_NOTE = (
    '">": even the highest rate tested misses the target. "—": one of the two meets it at the lowest rate tested already, '
    "or has no rate."
)


def frontier_table(record: BenchRecord, context: int) -> Table:
    """Return the rate and the ratio of every method at each ΔNLL, lowest rate first, unsupported methods last.

    Args:
        record: The bench of one model.
        context: Context length, a key of `record.corpora`.
    """
    rates = [rate for rate in record.equal_loss if rate.context == context]
    losses = sorted({rate.delta_nll for rate in rates})
    methods = sorted(dict.fromkeys(rate.method for rate in rates), key=lambda m: _order([r for r in rates if r.method == m]))
    columns = ("Method", *(f"Bits at ΔNLL {x:g}" for x in losses), *(f"Ratio at {x:g}" for x in losses), *SIDE_INFORMATION)
    rows = []
    for method in methods:
        by_loss = {rate.delta_nll: rate for rate in rates if rate.method == method}
        bits = [rate_cell(by_loss[loss]) for loss in losses]
        ratios = [f"{significant(16 / b, None)} x" if (b := by_loss[loss].median_bits) else ABSENT for loss in losses]
        rows.append((method, *bits, *ratios, *side_information_cells(record, method, context)))
    rows += [(method, *(ABSENT for _ in columns[1:])) for method in record.refused]
    return Table(
        f"{record.model.name}, context {context:,} tokens: bits per value at equal ΔNLL",
        columns,
        tuple(rows),
        notes=frontier_notes(record, context),
        warnings=tuple(record.warnings),
    )


def frontier_notes(record: BenchRecord, context: int) -> tuple[str, ...]:
    """Return the notes of the frontier table: protocol, definitions, unsupported methods, and the machine."""
    corpus, seeds = record.corpora[context], sorted({p.seed for p in record.points})
    steps = f", {record.step} at a time, with everything before them compressed" if record.step else ""
    cached = "latent and rotary key" if record.model.geometry.mla else "keys and values"
    return (
        f"{corpus.name}: {corpus.sequences} sequences. {context:,} tokens are compressed, then {record.scored} tokens are "
        f"read{steps}; all of these but the first are scored. Uncompressed: {record.uncompressed_nll[context]:.4f} nats per "
        f"token. Fitted on {record.calibration.name}, {record.run.settings['calibration_tokens']:,} tokens, seeds "
        f"{', '.join(map(str, seeds))}.",
        f"Bits: bits of the compressed cache, with sinks, window, scales and headers, per number of {cached}. Interpolated "
        "between the operating points of a method. Intervals: 95 %, bootstrap over sequences and seeds; none if more than "
        'a twentieth of the draws have no crossing. "k of n seeds": the median over all n seeds, of which k reach the '
        'target. "<": even the lowest rate tested loses less. ">": even the highest rate tested misses the target.',
        "Ratio = bytes of the 16-bit cache / bytes of the compressed cache. " + SIDE_INFORMATION_NOTE,
        *(f"{method} does not support this model: {why}." for method, why in record.refused.items()),
        f"Machine: {record.run.machine}.",
    )


def against_table(records: Sequence[BenchRecord], method: str) -> Table:
    """Return the rate of each method at equal ΔNLL divided by the rate of `method`, one column per model and loss.

    Args:
        records: The benches of several models.
        method: The method to divide by.
    """
    losses = sorted({rate.delta_nll for record in records for rate in record.equal_loss})
    columns = ("Method", *(f"{r.model.name} {c:,} at {loss:g}" for r in records for c in r.corpora for loss in losses))
    names = dict.fromkeys(rate.method for record in records for rate in record.equal_loss if rate.method != method)
    places = [(record, context, loss) for record in records for context in record.corpora for loss in losses]
    rows = tuple((name, *(_relative_cell(_rate(*place, method), _rate(*place, name)) for place in places)) for name in names)
    notes = (f"Bits per value of each method / bits per value of {method}, at the same ΔNLL. {RELATIVE_NOTE}",)
    return Table(f"Bits at equal ΔNLL, relative to {method}", columns, rows, notes=notes)


def rate_cell(rate: EqualLoss) -> str:
    """Return the cell of one rate: `2.5 [2.2, 2.8]`, `1.6 (2 of 3 seeds)`, `< 0.8`, `> 8`, or `—`."""
    crossed, seeds = sum(bits is not None for bits in rate.by_seed), len(rate.by_seed)
    median = rate.median_bits
    if median is None:
        if rate.end_bits is None:
            return ABSENT
        end = f"{'<' if rate.end == 'fewest' else '>'} {rate.end_bits:.3g}"
        return f"{end} ({crossed} of {seeds} seeds)" if crossed else end
    if crossed < seeds:
        return f"{significant(median, None)} ({crossed} of {seeds} seeds)"
    bits = rate.bits_per_value or median
    if rate.interval is None:
        return f"{significant(bits, None)} (no interval)"
    return f"{significant(bits, rate.interval)} [{rate.interval[0]:.2g}, {rate.interval[1]:.2g}]"


def significant(value: float, interval: tuple[float, float] | None) -> str:
    """Write a number with the digits that its interval supports: three if the interval is narrower than 6 %, else two."""
    narrow = interval is not None and interval[1] - interval[0] < 0.06 * abs(value)
    return f"{value:.3g}" if narrow else f"{value:.2g}"


def _order(rates: Sequence[EqualLoss]) -> tuple[float, ...]:
    """Return the sort key of a method: upper bounds of its rates, the one nearest to the usual loss first."""
    ordered = sorted((abs(rate.delta_nll - _USUAL), rate.at_most_bits) for rate in rates)
    return tuple(bits for _, bits in ordered)


def _rate(record: BenchRecord, context: int, loss: float, method: str) -> EqualLoss | None:
    matching = (r for r in record.equal_loss if (r.method, r.context, r.delta_nll) == (method, context, loss))
    return next(matching, None)


def _relative_cell(reference: EqualLoss | None, other: EqualLoss | None) -> str:
    if reference is None or other is None or reference.median_bits is None:
        return ABSENT
    if other.median_bits is None:
        return ABSENT if other.at_most_bits < inf else ">"
    return f"{other.median_bits / reference.median_bits:.2g}"
