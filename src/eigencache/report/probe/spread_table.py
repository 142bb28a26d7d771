"""The table of spreads: standard deviations over raw dimensions, K relative to V, by layer."""

from collections.abc import Iterable

from eigencache.records.probe import ProbeRecord, Spectrum
from eigencache.report.core.lookup import layer_indices, layers_of, pair, ratio_mean, spread_ratios
from eigencache.report.core.measured import LEGEND, NOTHING, Measured, factor, of_spectrum, over_layers
from eigencache.report.core.table import Table
from eigencache.report.probe.dead import dead_by_layer, dead_sentences


def _cached(record: ProbeRecord) -> tuple[tuple[str, ...], tuple[tuple[str, str, str], ...]]:
    """Return the tensors of the table, and its ratios as heading, dividend and divisor."""
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
    """Return `×54.1 (×11.4)`: max/min, and p95/p5 in brackets."""
    whole, inner = over_layers(measured, geometric=True), over_layers(robust, geometric=True)
    return whole.text(factor) if inner.value is None else f"{whole.text(factor)} ({inner.text(factor)})"


def _tensor_cell(spectra: list[Spectrum]) -> str:
    return _spread_cell((of_spectrum(s, s.spread) for s in spectra), (of_spectrum(s, s.spread_p95_p5) for s in spectra))


def spread_table(record: ProbeRecord) -> Table:
    """Return the spread of the standard deviations over raw dimensions by layer, and its ratios K/V."""
    names, ratios = _cached(record)
    dead = {name: counts for name in names if (counts := dead_by_layer(layers_of(record, name)))}
    columns = ("Layer", *names, *(heading for heading, _, _ in ratios), *(f"{name} dead" for name in dead))
    ratios_by_layer = [[spread_ratios(record, over, under, robust) for robust in (False, True)] for _, over, under in ratios]
    rows = []
    for layer_idx in layer_indices(record):
        tensors = [[s for s in layers_of(record, name) if s.layer_idx == layer_idx] for name in names]
        pairs = [[ratio.get(layer_idx, NOTHING) for ratio in pair_of] for pair_of in ratios_by_layer]
        counts = (str(of_tensor.get(layer_idx, 0)) for of_tensor in dead.values())
        rows.append((str(layer_idx), *map(_tensor_cell, tensors), *(_spread_cell([a], [b]) for a, b in pairs), *counts))
    overall = [_tensor_cell(layers_of(record, name)) for name in names]
    overall += [_spread_cell(whole.values(), inner.values()) for whole, inner in ratios_by_layer]
    rows.append(("geometric mean", *overall, *(f"{sum(of_tensor.values())} in all" for of_tensor in dead.values())))
    notes = (
        *spread_sentences(record),
        "Cells: max/min, an extreme-value statistic that grows with the width, and in brackets p95/p5, which does not",
        LEGEND[0],
    )
    title = (
        f"{record.model.name}: spread of standard deviations over raw dimensions; centered, heads of a layer concatenated"
    )
    return Table(title, columns, tuple(rows), notes)


def spread_sentences(record: ProbeRecord) -> tuple[str, ...]:
    """Return sentences on the spreads, with the numbers of the record, and on the dimensions that they leave out."""
    return (*_ratio_sentences(record), *dead_sentences(record))


def _ratio_sentences(record: ProbeRecord) -> tuple[str, ...]:
    if "latent" in record.names:
        return _equalization(record)
    chosen = pair(record)
    before, after = (ratio_mean(record, key, chosen.value) for key in (chosen.key_before, chosen.key_cached))
    if before.value is None or after.value is None:
        return ()
    if not chosen.rotated:
        return (f"The K spread is {before.text(factor)} the V spread (geometric mean over layers); keys are not rotated",)
    ratios = f"{after.text(factor)} the V spread after rotation and {before.text(factor)} before"
    return (f"The K spread is {ratios} (geometric mean over layers)",)


def _equalization(record: ProbeRecord) -> tuple[str, ...]:
    """Compare the spread of the cached latent with that of the expanded keys, and of the rotary key."""
    expanded, gain = ratio_mean(record, "keys_nope", "values"), ratio_mean(record, "keys_nope", "latent")
    rotary = ratio_mean(record, "key_rope_post_rope", "latent")
    sentences = []
    if gain.value is not None:
        size = "smaller" if gain.value > 1 else "no smaller"
        sentences.append(
            f"Equalization: the spread of the cached latent is {size} than that of the keys it expands to, which is "
            f"{gain.text(factor)} that of the latent (and {expanded.text(factor)} that of the expanded values)"
        )
    if rotary.value is not None:
        equalized = "is not equalized" if rotary.value > 1.5 else "has a similar spread"
        sentences.append(
            f"The rotary key, cached next to the latent, {equalized}: its spread is {rotary.text(factor)} that of the latent"
        )
    return tuple(sentences)
