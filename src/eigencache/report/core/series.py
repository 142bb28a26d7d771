"""The points of every figure, computed once for the static and the interactive version."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from eigencache.records.probe import ProbeRecord, Spectrum
from eigencache.report.core.lookup import (
    classic_kinds,
    classic_row,
    classic_tensor,
    classic_trivial,
    energy_at,
    held_out_at,
    held_out_energy_32,
    layers_of,
    pair,
    ratio_mean,
)
from eigencache.report.core.measured import ABSENT, DOUBT, ROOMY, Measured, of_spectrum, over_layers, short_names

LIMIT = 512  # points of a line; longer ones are thinned, evenly on a log axis
Points = tuple[list[float], list[Any]]  # x, and y: a number, or None for a gap


def thin(length: int, limit: int = LIMIT) -> list[int]:
    """Return at most `limit` of the indices 0 … length − 1, evenly on a log axis, with the first and the last."""
    if length <= limit:
        return list(range(length))
    grid = np.unique(np.geomspace(1, length, limit).round().astype(int)) - 1
    return [int(i) for i in grid]


def relative_eigenvalues(spectrum: Spectrum) -> Points:
    """Return component i from 1 and λ_i / mean λ; None below the rounding error p ε λ₁, for the log axis."""
    eigenvalues = spectrum.eigenvalues
    mean = math.fsum(eigenvalues) / len(eigenvalues)
    floor = max(eigenvalues[0], 0.0) * len(eigenvalues) * np.finfo(np.float64).eps
    chosen = thin(len(eigenvalues))
    return [i + 1.0 for i in chosen], [eigenvalues[i] / mean if eigenvalues[i] > floor else None for i in chosen]


def relative_null(spectrum: Spectrum) -> Points:
    """Return the Marchenko–Pastur null on the same axes; its m recorded eigenvalues are spread over all p components."""
    null = spectrum.null_eigenvalues
    if not null:
        return [], []
    mean = math.fsum(spectrum.eigenvalues) / len(spectrum.eigenvalues)
    step = spectrum.width / len(null)
    positions = [(j + 0.5) * step + 0.5 for j in range(len(null))]
    return positions, [value / mean if value > 0 else None for value in null]


def held_out_eigenvalues(spectrum: Spectrum) -> Points:
    """Return held-out λ / mean λ, one mean per octave of components, at the center of the octave."""
    energy = spectrum.held_out_energy or {}
    ends = sorted(energy)
    centers: list[float] = []
    means: list[float | None] = []
    for low, high in zip([0, *ends], ends, strict=False):
        share = energy[high] - energy.get(low, 0.0)
        centers.append(math.sqrt((low + 1) * high))
        means.append(share / (high - low) * spectrum.width if share > 0 else None)
    return centers, means


def energies(spectra: list[Spectrum], held_out: bool) -> Points:
    """Return k and the mean energy@k over the given layers, at the k that all of them record."""
    if not spectra:
        return [], []
    shared = set.intersection(*(set(s.energy) for s in spectra))
    ks = sorted(shared)
    at = held_out_at if held_out else energy_at
    return [float(k) for k in ks], [over_layers(at(s, k) for s in spectra).value for k in ks]


@dataclass(frozen=True)
class HeadMap:
    """Effective rank / width by layer and head; None if withheld. `marks`: `!` or `—` per cell, for the same indices."""

    name: str
    layers: list[int]
    heads: list[int]
    values: list[list[float | None]]
    marks: list[list[str]]


def _mark(spectrum: Spectrum | None) -> str:
    if spectrum is None or spectrum.effective_rank is None:
        return ABSENT
    return DOUBT if spectrum.support < ROOMY else ""


def head_maps(record: ProbeRecord) -> list[HeadMap]:
    """Return one map per tensor that has several heads."""
    maps = []
    for name in record.names:
        found = {(s.layer_idx, s.head): s for s in record.select(name, "head")}
        if not found:
            continue
        layers = sorted({layer for layer, _ in found if layer is not None})
        heads = sorted({head for _, head in found if head is not None})
        values: list[list[float | None]] = []
        marks: list[list[str]] = []
        for layer in layers:
            row = [found.get((layer, head)) for head in heads]
            values.append([s.effective_rank / s.width if s and s.effective_rank is not None else None for s in row])
            marks.append([_mark(s) for s in row])
        maps.append(HeadMap(name, layers, heads, values, marks))
    return maps


def head_range(maps: list[HeadMap]) -> tuple[float, float]:
    """Return one color range for all maps of a model: their extremes, rounded outward to 0.05."""
    found = [v for m in maps for row in m.values for v in row if v is not None]
    if not found:
        return 0.0, 1.0
    low, high = math.floor(min(found) * 20) / 20, math.ceil(max(found) * 20) / 20
    return (low, high) if high > low else (max(0.0, low - 0.05), high)


def spreads(record: ProbeRecord, name: str, robust: bool = False) -> Points:
    """Return layer and spread of one tensor; None for an infinite one (see `infinite_layers`) and where nothing varies."""
    spectra = layers_of(record, name)
    values = [s.spread_p95_p5 if robust else s.spread for s in spectra]
    return [float(s.layer_idx or 0) for s in spectra], [v if v is not None and math.isfinite(v) else None for v in values]


def infinite_layers(record: ProbeRecord, name: str) -> list[int]:
    """Return the layers whose spread is infinite, in a record from before constant dimensions were left out of spreads."""
    return [s.layer_idx for s in layers_of(record, name) if s.layer_idx is not None and s.spread == math.inf]


def spectrum_range(record: ProbeRecord) -> tuple[float, float]:
    """Return one range for λ / mean λ over all layers and tensors, as exponents of ten; at most twelve decades."""
    found = [v for n in record.names for s in layers_of(record, n) for v in relative_eigenvalues(s)[1] if v]
    if not found:
        return -1.0, 1.0
    high = math.ceil(math.log10(max(found)))
    return max(math.floor(math.log10(min(found))), high - 12), high


@dataclass(frozen=True)
class EnergyTriple:
    """Energy@32 of K or V of one model, measured in three ways; None if withheld."""

    label: str
    tensor: str
    repeated: float | None  # in-sample, on the repeated sentences of the original probe
    this_text: float | None  # in-sample, on the text of the record
    held_out: Measured  # before rotation


def energy_triples(records: list[ProbeRecord]) -> list[EnergyTriple]:
    """Return one line per model and kind of the original probe that is wider than 32 (else energy@32 is 1)."""
    lines = []
    for record, name in zip(records, short_names(records), strict=True):
        for kind in classic_kinds(record):
            this_text, repeated = classic_row(record, (kind,)), classic_row(record, (kind,), repeated=True)
            either = this_text or repeated
            if either is None or classic_trivial(record, either):
                continue
            tensor = (pair(record).key_before if kind == "keys" else classic_tensor(record, kind)) or kind
            values = [row.energy_32 if row else None for row in (repeated, this_text)]
            lines.append(EnergyTriple(f"{name} · {kind}", tensor, values[0], values[1], held_out_energy_32(record, kind)))
    return lines


@dataclass(frozen=True)
class ModelPoint:
    """One model's tensor in a cross-model figure."""

    label: str
    tensor: str
    measured: Measured


def rank_points(records: list[ProbeRecord]) -> list[ModelPoint]:
    """Return the mean effective rank / width over layers for keys before rotation, values and the latent."""
    points = []
    for record, name in zip(records, short_names(records), strict=True):
        chosen = pair(record)
        for tensor in dict.fromkeys((chosen.key_before, chosen.value, "latent")):
            if tensor and (spectra := layers_of(record, tensor)):
                ratio = [
                    of_spectrum(s, s.effective_rank / s.width if s.effective_rank is not None else None) for s in spectra
                ]
                points.append(ModelPoint(name, tensor, over_layers(ratio)))
    return points


def ratio_points(records: list[ProbeRecord]) -> list[ModelPoint]:
    """Return the geometric mean over layers of K spread / V spread, before rotation and as cached."""
    points = []
    for record, name in zip(records, short_names(records), strict=True):
        chosen = pair(record)
        for key in dict.fromkeys((chosen.key_before, chosen.key_cached)):
            if key and chosen.value:
                points.append(ModelPoint(name, key, ratio_mean(record, key, chosen.value)))
    return points
