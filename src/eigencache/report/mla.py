"""Tables that compare the latent of MLA with its expanded keys and values, and models at equal bytes."""

from collections.abc import Sequence

from eigencache.records.mla import LatentComparison
from eigencache.records.quality import SweepRecord
from eigencache.report.core.table import Table


def latent_table(model: str, comparison: LatentComparison) -> Table:
    """Return the bytes per token of both caches; the notes give the difference of their logits.

    Args:
        model: Name of the model.
        comparison: The measured comparison.
    """
    rows = (
        ("latent and rotary key", f"{comparison.latent_nbytes:,}", "1.00"),
        (
            "expanded keys and values",
            f"{comparison.expanded_nbytes:,}",
            f"{comparison.expanded_nbytes / comparison.latent_nbytes:.2f}",
        ),
    )
    notes = (
        f"Largest absolute difference of any logit between both caches over {comparison.tokens:,} tokens: "
        f"{comparison.largest_difference:.1e} (largest logit {comparison.largest_logit:.1f}).",
        "transformers caches the latent and expands it for the whole past at every step.",
    )
    return Table(f"{model}: cache contents", ("Cached", "Bytes per token, 16 bits", "Relative to the latent"), rows, notes)


def equal_bytes_table(records: Sequence[SweepRecord]) -> Table:
    """Return the NLL of all points of all models, by ascending bytes per token.

    Args:
        records: One sweep per model.
    """
    points = [
        (quality.encoded_nbytes / quality.encoded_tokens, record, series, point, quality)
        for record in records
        for series in record.series
        for point in series.points
        for quality in (point.quality,)
    ]
    rows = tuple(
        (record.model.name, f"{per_token:,.0f}", series.name, f"{point.rank} of {series.width}", f"{quality.nll:.4f}")
        for per_token, record, series, point, quality in sorted(points, key=lambda point: point[0])
    )
    notes = tuple(f"{r.model.name}: {r.uncompressed_nll:.4f} nats per token uncompressed, {_width(r)}." for r in records)
    columns = ("Model", "Bytes per token", "Compressed", "Rank", "NLL (nats per token)")
    return Table("Loss at equal bytes", columns, rows, notes, words=frozenset({"Compressed"}), identity=4)


def _width(record: SweepRecord) -> str:
    geometry = record.model.geometry
    return f"{2 * geometry.values_per_token:,} bytes per token in 16 bits, KV width / hidden size {geometry.width_ratio:.2f}"
