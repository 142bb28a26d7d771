"""MLA's latent against what it expands to, and against standard attention at equal bytes, as tables."""

from collections.abc import Sequence

from eigencache.records.mla import LatentComparison
from eigencache.records.quality import SweepRecord
from eigencache.report.core.table import Table


def latent_table(model: str, found: LatentComparison) -> Table:
    """Bytes per token of both ways to cache, and how far their logits are apart."""
    rows = (
        ("latent and rotary key", f"{found.latent_nbytes:,}", "1.00"),
        ("expanded keys and values", f"{found.expanded_nbytes:,}", f"{found.expanded_nbytes / found.latent_nbytes:.2f}"),
    )
    notes = (
        f"Largest difference of any logit over {found.tokens:,} tokens, expanding the cached latent anew against keeping "
        f"its expansion: {found.largest_difference:.1e} (largest logit {found.largest_logit:.1f}).",
        "transformers caches the latent and expands the whole past at every step.",
    )
    return Table(f"{model}: what is cached", ("Cached", "Bytes per token, 16 bit", "Against the latent"), rows, notes)


def equal_bytes_table(records: Sequence[SweepRecord]) -> Table:
    """Every point of every model by bytes per token, ascending: loss itself, not its difference."""
    points = [
        (quality.encoded_nbytes / quality.encoded_tokens, record, series, point, quality)
        for record in records
        for series in record.series
        for point in series.points
        for quality in (point.quality,)
    ]
    rows = tuple(
        (record.model.name, f"{per_token:,.0f}", series.name, f"{point.rank} of {series.width}", f"{quality.nll:.4f}")
        for per_token, record, series, point, quality in sorted(points, key=lambda one: one[0])
    )
    notes = tuple(f"{r.model.name}: {r.uncompressed_nll:.4f} nats per token uncompressed, {_width(r)}." for r in records)
    columns = ("Model", "Bytes per token", "Compressed", "Rank", "NLL (nats per token)")
    return Table("Loss at equal bytes", columns, rows, notes, words=frozenset({"Compressed"}))


def _width(record: SweepRecord) -> str:
    geometry = record.model.geometry
    return f"{2 * geometry.values_per_token:,} bytes per token at 16 bit, KV width / hidden size {geometry.width_ratio:.2f}"
