"""Folded attention against decode-then-attend, as a table."""

from collections.abc import Sequence

from eigencache.records.folding import FoldingResult
from eigencache.report.core.table import Table


def folding_table(model: str, dtype: str, results: Sequence[FoldingResult]) -> Table:
    """One row per target: what folding changes, beside what compression changes."""
    columns = (
        "Compressed",
        "Folded against decoded",
        "Decoded against uncompressed",
        "Largest logit",
        "Cache bytes",
        "Uncompressed",
    )
    rows = tuple(
        (
            result.codec,
            f"{result.rounding:.1e}",
            f"{result.effect:.3f}",
            f"{result.scale:.1f}",
            f"{result.coefficients_nbytes:,}",
            f"{result.vectors_nbytes:,}",
        )
        for result in results
    )
    notes = (
        f"Largest difference of any logit over {results[0].tokens:,} tokens, computed in {dtype}. "
        "Bytes: what the cache of the last sequence holds, in that dtype.",
    )
    return Table(f"{model}: attention on coefficients", columns, rows, notes=notes)
