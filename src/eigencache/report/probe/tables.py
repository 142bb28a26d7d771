"""Every number in a table says its frame, centering and scope in the heading or the row; `—` and `!` say what is missing.

All functions return a `Table`: print it with a `rich` console, or take its `markdown()` or `html()`.
`classic_table` and `compare_table` are in `comparison` and are offered here too.
"""

from collections.abc import Iterable

from eigencache.records.probe import ProbeRecord, Spectrum
from eigencache.report.core.lookup import (
    energy_at,
    held_out_at,
    layer_indices,
    layers_of,
    loud_warnings,
    pair,
    ratio_mean,
    sensible_k,
    spread_ratios,
)
from eigencache.report.core.measured import (
    LEGEND,
    NOTHING,
    ROOMY_TAIL,
    Measured,
    count,
    factor,
    of_spectrum,
    over_layers,
    share,
)
from eigencache.report.core.table import Table
from eigencache.report.probe.comparison import classic_table, compare_table

__all__ = ["classic_table", "compare_table", "geometry_lines", "probe_table", "spread_table"]

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
)


def _statistics(spectrum: Spectrum, k: int) -> dict[str, Measured]:
    """The statistics of one row of the probe table, in the order of its columns."""
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
    k = sensible_k(spectrum)
    return (
        place,
        spectrum.name,
        f"{spectrum.width:,}",
        str(k),
        *_cells(_statistics(spectrum, k)),
        f"{spectrum.support:.3g}",
    )


def _mean_row(name: str, spectra: list[Spectrum]) -> tuple[str, ...]:
    """The mean over layers; spreads by their geometric mean, support by its lowest."""
    narrowest = min(spectra, key=lambda s: s.width)
    k = sensible_k(narrowest)
    rows = [_statistics(s, k) for s in spectra]
    means = {column: over_layers((row[column] for row in rows), geometric=column == "spread") for column in rows[0]}
    widths = sorted({s.width for s in spectra})
    width = f"{widths[0]:,}" if len(widths) == 1 else f"{widths[0]:,}–{widths[-1]:,}"
    return "mean of layers", name, width, str(k), *_cells(means), f"≥ {min(s.support for s in spectra):.3g}"


def probe_table(record: ProbeRecord, per_layer: bool = True) -> Table:
    """Every captured tensor, layer by layer and overall: centered, heads of a layer joined."""
    rows = []
    if per_layer:
        for layer_idx in layer_indices(record):
            for name in record.names:
                rows += [_probe_row(str(layer_idx), s) for s in layers_of(record, name) if s.layer_idx == layer_idx]
    for name in record.names:
        if spectra := layers_of(record, name):
            rows.append(_mean_row(name, spectra))
    for name in record.names:
        rows += [_probe_row("all layers joined", s) for s in record.select(name, "all")]
    notes = (
        *LEGEND,
        "Spread: largest over smallest standard deviation of the raw dimensions (its mean of layers is geometric); "
        "Mean share: |mean|² / E|x|²; Vectors per dim.: independent vectors, or distinct 8-grams where fewer, over width",
    )
    text = f"{record.corpus.name} ({record.corpus.tokens:,} tokens)"
    title = f"{record.model.name}: spectra on {text}; centered, heads of a layer joined"
    return Table(title, _PROBE_COLUMNS, tuple(rows), notes, tuple(loud_warnings(record)), frozenset({"Tensor"}))


def _cached(record: ProbeRecord) -> tuple[tuple[str, ...], tuple[tuple[str, str, str], ...]]:
    """The tensors of the spread table, and its ratios: heading, over, under."""
    if "latent" in record.names:
        names = ("latent", "key_rope_pre_rope", "key_rope_post_rope", "keys_nope", "values")
        ratios = (
            ("keys_nope / values", "keys_nope", "values"),
            ("rotary key / latent", "key_rope_post_rope", "latent"),
            ("keys_nope / latent", "keys_nope", "latent"),
        )
        return tuple(n for n in names if n in record.names), ratios
    chosen = pair(record)
    if chosen.key_before is None or chosen.key_cached is None or chosen.value is None:
        return tuple(record.names), ()
    if not chosen.rotated:
        return (chosen.key_before, chosen.value), (("K/V", chosen.key_before, chosen.value),)
    ratios = (("K/V pre-RoPE", chosen.key_before, chosen.value), ("K/V post-RoPE", chosen.key_cached, chosen.value))
    return (chosen.key_before, chosen.key_cached, chosen.value), ratios


def _spread_cell(measured: Iterable[Measured], robust: Iterable[Measured]) -> str:
    """`×54.1 (×11.4)`: max/min, and p95/p5 in brackets."""
    whole, inner = over_layers(measured, geometric=True), over_layers(robust, geometric=True)
    return whole.text(factor) if inner.value is None else f"{whole.text(factor)} ({inner.text(factor)})"


def _tensor_cell(spectra: list[Spectrum]) -> str:
    return _spread_cell((of_spectrum(s, s.spread) for s in spectra), (of_spectrum(s, s.spread_p95_p5) for s in spectra))


def spread_table(record: ProbeRecord) -> Table:
    """Spread of the standard deviations over raw dimensions per layer, K against V, before and after rotation."""
    names, ratios = _cached(record)
    columns = ("Layer", *names, *(heading for heading, _, _ in ratios))
    both = [[spread_ratios(record, over, under, robust) for robust in (False, True)] for _, over, under in ratios]
    rows = []
    for layer_idx in layer_indices(record):
        tensors = [[s for s in layers_of(record, name) if s.layer_idx == layer_idx] for name in names]
        pairs = [[found.get(layer_idx, NOTHING) for found in kinds] for kinds in both]
        rows.append((str(layer_idx), *map(_tensor_cell, tensors), *(_spread_cell([a], [b]) for a, b in pairs)))
    overall = [_tensor_cell(layers_of(record, name)) for name in names]
    overall += [_spread_cell(whole.values(), inner.values()) for whole, inner in both]
    rows.append(("geometric mean", *overall))
    notes = (
        *spread_sentences(record),
        "Each cell: max/min, which is an extreme-value statistic and grows with the width, and (p95/p5), which is not",
        LEGEND[0],
    )
    title = f"{record.model.name}: spread of standard deviations over raw dimensions; centered, heads of a layer joined"
    return Table(title, columns, tuple(rows), notes)


def spread_sentences(record: ProbeRecord) -> tuple[str, ...]:
    """What the spreads say, in plain sentences made of this record's numbers."""
    if "latent" in record.names:
        return _equalization(record)
    chosen = pair(record)
    before, after = (ratio_mean(record, key, chosen.value) for key in (chosen.key_before, chosen.key_cached))
    if before.value is None or after.value is None:
        return ()
    if not chosen.rotated:
        return (f"The K spread is {before.text(factor)} the V spread (geometric mean of layers); keys are not rotated here",)
    ratios = f"{after.text(factor)} the V spread after rotation and {before.text(factor)} before"
    return (f"The K spread is {ratios} (geometric mean of layers)",)


def _equalization(record: ProbeRecord) -> tuple[str, ...]:
    """What caching the latent in place of the expanded keys is worth, and what the rotary key takes back."""
    expanded, gain = ratio_mean(record, "keys_nope", "values"), ratio_mean(record, "keys_nope", "latent")
    rotary = ratio_mean(record, "key_rope_post_rope", "latent")
    sentences = []
    if gain.value is not None:
        verb = "less than" if gain.value > 1 else "no less than"
        sentences.append(
            f"Equalization: the cached latent spreads {verb} the keys it expands to, whose spread is {gain.text(factor)} "
            f"that of the latent (and {expanded.text(factor)} that of the expanded values)"
        )
    if rotary.value is not None:
        also = "not equalized" if rotary.value > 1.5 else "about as even"
        sentences.append(
            f"The rotary key, cached beside the latent, is {also}: its spread is {rotary.text(factor)} the latent's"
        )
    return tuple(sentences)


def geometry_lines(record: ProbeRecord) -> list[str]:
    """What the model caches and what one token costs, one fact per line."""
    model, geometry = record.model, record.model.geometry
    lines = [
        f"{model.name}: {model.architecture}, {model.parameters:,} parameters, {model.dtype} on {model.device}",
        geometry.describe(),
        f"{geometry.values_per_token:,} numbers per token = {geometry.values_per_token * 2:,} bytes at 16 bit",
    ]
    if geometry.mla:
        more = geometry.expanded_values_per_token / geometry.values_per_token
        lines.append(
            f"expanded keys and values would take {geometry.expanded_values_per_token:,} numbers per token ({more:.1f} ×)"
        )
    ratio = f"KV width / hidden size {geometry.width_ratio:.2f}"
    if geometry.width_ratio > 1 and not geometry.mla:
        lines.append(
            f"{ratio}: {1 - 1 / geometry.width_ratio:.0%} of the cache is redundant by algebra, whatever the spectra say"
        )
    else:
        lines.append(f"{ratio}: no redundancy by width alone")
    lines += [f"layer {layer_idx}: no cache ({why})" for layer_idx, why in geometry.skipped.items()]
    return [*lines, *geometry.notes, f"captured by {model.adapter}; model sha256 {model.sha256[:16]}"]
