"""The table of model quality: held-out loss and copy accuracy."""

from eigencache.records.probe import ScoreRecord
from eigencache.report.core.table import Table


def score_table(records: list[ScoreRecord]) -> Table:
    """Return one row per model: held-out loss in nats per token, also by position, and copy accuracy."""
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
    return Table("Prediction quality of the models", columns, rows, notes=tuple(sorted(texts)))
