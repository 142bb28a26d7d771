"""How well models predict, as a table."""

from eigencache.records.probe import ScoreRecord
from eigencache.report.core.table import Table


def score_table(records: list[ScoreRecord]) -> Table:
    """One row per model: held-out loss in nats per token, by position, and copy accuracy; the text is named below."""
    positions = sorted({end for record in records for end in record.loss_by_position})
    starts = dict(zip(positions, [0, *positions], strict=False))
    columns = ("Model", "Loss (nats/token)", *(f"Loss at {starts[end]}–{end}" for end in positions), "Copy accuracy")
    rows = tuple(
        (
            record.model,
            f"{record.loss_nats:.3f}",
            *(f"{record.loss_by_position[end]:.3f}" if end in record.loss_by_position else "—" for end in positions),
            f"{record.copy_accuracy:.3f}",
        )
        for record in records
    )
    texts = {f"{r.corpus.name}, {r.corpus.tokens:,} tokens in {r.corpus.sequences} sequences" for r in records}
    return Table("Does the model predict?", columns, rows, notes=tuple(sorted(texts)))
