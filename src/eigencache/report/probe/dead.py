"""Sentences on dead dimensions: raw dimensions of a tensor that never vary, which spreads leave out."""

from collections.abc import Iterable

from eigencache.records.probe import ProbeRecord, Spectrum
from eigencache.report.core.lookup import layers_of


def dead_by_layer(spectra: Iterable[Spectrum]) -> dict[int, int]:
    """Return the number of dead dimensions of every layer that has some, added up over its spectra."""
    counts: dict[int, int] = {}
    for s in spectra:
        if s.layer_idx is not None and s.dead:
            counts[s.layer_idx] = counts.get(s.layer_idx, 0) + len(s.dead)
    return counts


def dead_sentences(record: ProbeRecord) -> tuple[str, ...]:
    """Return one sentence per tensor with dead dimensions, which names its layers and their numbers."""
    sentences = []
    for name in record.names:
        spectra = layers_of(record, name)
        counts = dead_by_layer(spectra)
        if not counts:
            continue
        layers: dict[int, list[int]] = {}
        for layer_idx, count in counts.items():
            layers.setdefault(count, []).append(layer_idx)
        listed = "; ".join(f"{count} in {named_layers(at)}" for count, at in sorted(layers.items()))
        sentences.append(f"{name}: {_some(counts, len(spectra))} (they never vary, and spreads leave them out): {listed}")
    return tuple(sentences)


def dead_totals(record: ProbeRecord) -> str | None:
    """Return one sentence with the totals of all tensors that have dead dimensions; None if none has."""
    by_name = {name: layers_of(record, name) for name in record.names}
    parts = [
        f"{_some(counts, len(spectra))} of {name}" for name, spectra in by_name.items() if (counts := dead_by_layer(spectra))
    ]
    return f"spreads leave out dimensions that never vary: {', '.join(parts)}" if parts else None


def _some(counts: dict[int, int], layers: int) -> str:
    total = sum(counts.values())
    return (
        f"{total:,} dead dimension{'s' if total > 1 else ''} in {len(counts)} of {layers} layer{'s' if layers > 1 else ''}"
    )


def named_layers(layers: Iterable[int]) -> str:
    """Return `layer 3`, or `layers 0–2, 5`: neighbors as a range."""
    runs: list[list[int]] = []
    for layer_idx in sorted(layers):
        if runs and layer_idx == runs[-1][-1] + 1:
            runs[-1].append(layer_idx)
        else:
            runs.append([layer_idx])
    text = ", ".join(f"{run[0]}–{run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs)
    return f"layer{'s' if len(runs) > 1 or len(runs[0]) > 1 else ''} {text}"
