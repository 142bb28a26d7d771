"""Tables of the spectra of one probe: a summary per tensor, and all statistics by layer."""

from eigencache.records.probe import ProbeRecord, Spectrum
from eigencache.report.core.lookup import (
    all_warnings,
    energy_at,
    held_out_at,
    layer_indices,
    layers_of,
    table_k,
)
from eigencache.report.core.measured import (
    LEGEND,
    ROOMY_TAIL,
    Measured,
    count,
    factor,
    of_spectrum,
    over_layers,
    share,
)
from eigencache.report.core.table import Table
from eigencache.report.probe.dead import dead_sentences

_PROBE_COLUMNS = (
    "Layer",
    "Tensor",
    "Width",
    "k",
    "Energy@k",
    "Held-out energy@k",
    "Rank .90",
    "Rank .99",
    "Effective rank [95\u00a0%]",
    "Spread",
    "Mean share",
    "Vectors per dim.",
    "Dead dim.",
)


def _statistics(spectrum: Spectrum, k: int) -> dict[str, Measured]:
    """Return the statistics of one row, in the order of the columns."""
    return {
        "energy": energy_at(spectrum, k),
        "held_out": held_out_at(spectrum, k),
        "rank_90": of_spectrum(spectrum, spectrum.rank_90, "rank_90"),
        "rank_99": of_spectrum(spectrum, spectrum.rank_99, enough=ROOMY_TAIL),
        "effective_rank": of_spectrum(spectrum, spectrum.effective_rank, "effective_rank"),
        "spread": of_spectrum(spectrum, spectrum.spread),
        "mean_share": of_spectrum(spectrum, spectrum.mean_share),
    }


def _cells(statistics: dict[str, Measured]) -> tuple[str, ...]:
    plain = {name: Measured(m.value, m.doubtful, None, m.used, m.of) for name, m in statistics.items()}
    return (
        plain["energy"].text(share),
        plain["held_out"].text(share),
        plain["rank_90"].text(count),
        plain["rank_99"].text(count),
        statistics["effective_rank"].text(count),
        plain["spread"].text(factor),
        plain["mean_share"].text(share),
    )


def _probe_row(place: str, spectrum: Spectrum) -> tuple[str, ...]:
    k = table_k(spectrum)
    return (
        place,
        spectrum.name,
        f"{spectrum.width:,}",
        str(k),
        *_cells(_statistics(spectrum, k)),
        f"{spectrum.support:.3g}",
        str(len(spectrum.dead)),
    )


def _mean_row(name: str, spectra: list[Spectrum]) -> tuple[str, ...]:
    """Return the row of the mean over layers: the geometric mean of spreads, the lowest support, all dead dimensions."""
    narrowest = min(spectra, key=lambda s: s.width)
    k = table_k(narrowest)
    rows = [_statistics(s, k) for s in spectra]
    means = {column: over_layers((row[column] for row in rows), geometric=column == "spread") for column in rows[0]}
    widths = sorted({s.width for s in spectra})
    width = f"{widths[0]:,}" if len(widths) == 1 else f"{widths[0]:,}–{widths[-1]:,}"
    dead = sum(len(s.dead) for s in spectra)
    return "mean", name, width, str(k), *_cells(means), f"≥ {min(s.support for s in spectra):.3g}", f"{dead} in all"


def probe_table(record: ProbeRecord, per_layer: bool = True) -> Table:
    """Return all statistics of every tensor, by layer and over all layers: centered, heads of a layer concatenated.

    The column of dead dimensions is left out if there are none.

    Args:
        record: The probe record.
        per_layer: Include one row per layer and tensor, not only those over all layers.
    """
    rows = []
    if per_layer:
        for layer_idx in layer_indices(record):
            for name in record.names:
                rows += [_probe_row(str(layer_idx), s) for s in layers_of(record, name) if s.layer_idx == layer_idx]
    for name in record.names:
        if spectra := layers_of(record, name):
            rows.append(_mean_row(name, spectra))
    for name in record.names:
        rows += [_probe_row("all layers", s) for s in record.select(name, "all")]
    dead = any(s.dead for s in record.select())
    notes = (
        *LEGEND,
        *dead_sentences(record),
        "Spread: largest / smallest standard deviation of the raw dimensions (geometric mean over layers). Mean share: "
        "|mean|² / E|x|². All layers: their vectors are concatenated. Vectors per dim.: independent vectors, or "
        "distinct 8-grams if fewer, / width",
    )
    text = f"{record.corpus.name} ({record.corpus.tokens:,} tokens)"
    title = f"{record.model.name}: spectra on {text}; centered, heads of a layer concatenated"
    return Table(
        title,
        _PROBE_COLUMNS if dead else _PROBE_COLUMNS[:-1],
        tuple(row if dead else row[:-1] for row in rows),
        notes,
        tuple(all_warnings(record)),
        words=frozenset({"Tensor"}),
        identity=2,
        hidden_first=("Mean share", "Energy@k", "Rank .99", "k", "Rank .90", "Width"),
    )


def geometry_lines(record: ProbeRecord) -> list[str]:
    """Return the geometry of the cache and the bytes of one token, one fact per line."""
    model, geometry = record.model, record.model.geometry
    lines = [
        f"{model.name}: {model.architecture}, {model.parameters:,} parameters, {model.dtype} on {model.device}",
        geometry.describe(),
    ]
    if geometry.mla:
        more = geometry.expanded_values_per_token / geometry.values_per_token
        lines.append(
            f"expanded keys and values: {geometry.expanded_values_per_token:,} numbers per token ({more:.1f} × the latent)"
        )
    if geometry.width_ratio > 1 and not geometry.mla:
        redundant = 1 - 1 / geometry.width_ratio
        lines.append(f"{redundant:.0%} of the cache is redundant: it is wider than the hidden state")
    lines += [f"layer {layer_idx}: no cache ({why})" for layer_idx, why in geometry.skipped.items()]
    return [*lines, *geometry.notes, f"captured by {model.adapter}; model sha256 {model.sha256[:16]}"]
