"""The table of folded attention compared with decoding before attention."""

from collections.abc import Sequence

from eigencache.records.folding import FoldingResult
from eigencache.report.core.table import Table


def folding_table(model: str, dtype: str, results: Sequence[FoldingResult]) -> Table:
    """Return one row per codec: the change of the logits by folding and by compression, and cache bytes.

    Args:
        model: Name of the model.
        dtype: Dtype of the computation.
        results: One result per codec.
    """
    columns = (
        "Compressed",
        "Folded vs decoded",
        "Decoded vs uncompressed",
        "Largest logit",
        "Folded cache bytes",
        "Plain cache bytes",
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
        f"Largest absolute difference of any logit over {results[0].tokens:,} tokens, computed in {dtype}. "
        "Bytes: of the cache after the last sequence, in that dtype. "
        "Bases: centered PCA of every head, of keys after rotation.",
    )
    return Table(f"{model}: attention on coefficients", columns, rows, notes=notes)
