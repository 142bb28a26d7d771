"""The table of all operating points, and the two columns on side information that all tables of a bench share."""

from math import log

from eigencache.records.bench import BenchRecord
from eigencache.records.quality import Quality
from eigencache.report.core.measured import ABSENT
from eigencache.report.core.table import Table
from eigencache.report.quality.sweep_table import interval_cell

SIDE_INFORMATION = ("Side information (MB)", "Break-even context (tokens)")
_KL = 0.03  # nats; side information is shown for the operating point nearest to it
SIDE_INFORMATION_NOTE = (
    f"Side information: bases, means and tables, stored once and not included in any rate; of the operating point whose KL "
    f"is nearest to {_KL:g}. Break-even context: the context length whose saved bytes equal the side information."
)


def side_information_cells(record: BenchRecord, method: str, context: int) -> tuple[str, str]:
    """Return the cells of `SIDE_INFORMATION` for the operating point of a method whose KL is nearest to 0.03 nats."""
    measured = [p.quality for p in record.points if (p.method, p.context) == (method, context)]
    if not measured:
        return ABSENT, ABSENT
    return _cells(min(measured, key=lambda quality: abs(log(max(quality.kl, 1e-9) / _KL))))


def _cells(quality: Quality) -> tuple[str, str]:
    tokens = quality.break_even_context
    return f"{quality.basis_nbytes / 1e6:.2f}", "never" if tokens is None else f"{tokens:,}"


def points_table(record: BenchRecord, context: int) -> Table:
    """Return every operating point of every seed at one context length: rate, loss with interval, KL, side information."""
    columns = ("Method", "Point", "Seed", "Bits", "Ratio", "ΔNLL (nats)", "KL (nats)", "Top-1", *SIDE_INFORMATION)
    rows = tuple(
        (
            p.method,
            p.point,
            f"{p.seed}",
            f"{p.bits_per_value:.3f}",
            f"{p.quality.compression_ratio:.2f}",
            interval_cell(p.quality),
            f"{p.quality.kl:.4f}",
            f"{100 * p.quality.top1_agreement:.1f} %",
            *_cells(p.quality),
        )
        for p in record.points
        if p.context == context
    )
    title = f"{record.model.name}, context {context:,} tokens: all operating points"
    return Table(title, columns, rows, words=frozenset({"Point"}), identity=3)
