"""Look up the spectra and figures of a probe record that tables and plots show."""

import math
from dataclasses import dataclass

from eigencache.records.probe import ClassicRow, ProbeRecord, Spectrum
from eigencache.report.core.measured import NOTHING, ROOMY, Measured, of_spectrum, over_layers

CLASSIC_K = 32


@dataclass(frozen=True)
class Pair:
    """Names of the key and value tensors to compare; without rotation both keys are the same tensor."""

    key_before: str | None  # keys_pre_rope, keys, or keys_nope
    key_cached: str | None  # keys_post_rope, keys, or keys_nope
    value: str | None

    @property
    def rotated(self) -> bool:
        """Whether keys before and after rotation are different tensors."""
        return self.key_before != self.key_cached


def pair(record: ProbeRecord) -> Pair:
    """Return the key and value tensors of a record; for an MLA model the expanded ones (`keys_nope` is never rotated)."""
    names = record.names
    before = next((n for n in ("keys_pre_rope", "keys", "keys_nope") if n in names), None)
    cached = next((n for n in ("keys_post_rope", "keys", "keys_nope") if n in names), None)
    return Pair(before, cached, "values" if "values" in names else None)


def layers_of(record: ProbeRecord, name: str | None, centered: bool = True) -> list[Spectrum]:
    """Return the spectra of one tensor at scope `layer`, by layer; none if `name` is None."""
    spectra = record.select(name, "layer", centered=centered) if name else []
    return sorted(spectra, key=lambda s: s.layer_idx or 0)


def layer_indices(record: ProbeRecord) -> list[int]:
    """Return the indices of the layers that have a spectrum at scope `layer`."""
    return sorted({s.layer_idx for s in record.select(scope="layer", centered=None) if s.layer_idx is not None})


def quarter_k(spectrum: Spectrum) -> int:
    """Return the largest recorded k that is at most a quarter of the width, and at least 1."""
    return max((k for k in spectrum.energy if k <= max(1, spectrum.width // 4)), default=min(spectrum.energy))


def table_k(spectrum: Spectrum) -> int:
    """Return the k at which tables show energy: 32 if the spectrum is wider, else a quarter of the width."""
    return CLASSIC_K if spectrum.width > CLASSIC_K and CLASSIC_K in spectrum.energy else quarter_k(spectrum)


def energy_at(spectrum: Spectrum, k: int) -> Measured:
    """Return the in-sample energy@k; withheld below one vector per dimension, because it is then always near 1."""
    return of_spectrum(spectrum, spectrum.energy.get(k) if spectrum.support >= 1 else None)


def held_out_at(spectrum: Spectrum, k: int) -> Measured:
    """Return the held-out energy@k; None if no sequences were held out."""
    return of_spectrum(spectrum, (spectrum.held_out_energy or {}).get(k))


@dataclass(frozen=True)
class MeanEnergy:
    """Mean energy@k over the layers of one tensor, with k and the smallest width."""

    measured: Measured
    k: int | None
    width: int | None

    @property
    def label(self) -> str:
        """Text such as `@32 of 128`."""
        return f"@{self.k} of {self.width}" if self.k else ""


def held_out_mean(record: ProbeRecord, name: str | None, quarter: bool = False) -> MeanEnergy:
    """Return the mean held-out energy over the layers of a tensor, at one k for all.

    Args:
        record: The probe record.
        name: The tensor.
        quarter: Use k = a quarter of the smallest width instead of `table_k`.
    """
    spectra = layers_of(record, name)
    if not spectra:
        return MeanEnergy(NOTHING, None, None)
    narrowest = min(spectra, key=lambda s: s.width)
    k = quarter_k(narrowest) if quarter else table_k(narrowest)
    return MeanEnergy(over_layers(held_out_at(s, k) for s in spectra), k, narrowest.width)


def rank_mean(record: ProbeRecord, name: str | None) -> Measured:
    """Return the mean effective rank (Roy & Vetterli 2007) over the layers of one tensor."""
    return over_layers(of_spectrum(s, s.effective_rank) for s in layers_of(record, name))


def spread_ratios(record: ProbeRecord, over: str | None, under: str | None, robust: bool = False) -> dict[int, Measured]:
    """Return the spread of one tensor divided by that of another, by layer.

    Args:
        record: The probe record.
        over: The tensor to divide.
        under: The tensor to divide by.
        robust: Use the spread between the 95th and the 5th percentile instead of max/min.
    """
    below = {s.layer_idx: s for s in layers_of(record, under)}
    ratios: dict[int, Measured] = {}
    for s in layers_of(record, over):
        other = below.get(s.layer_idx)
        if other is None or s.layer_idx is None:
            continue
        a, b = (s.spread_p95_p5, other.spread_p95_p5) if robust else (s.spread, other.spread)
        ratio = a / b if a and b and math.isfinite(a) and math.isfinite(b) else None
        ratios[s.layer_idx] = Measured(ratio, min(s.support, other.support) < ROOMY)
    return ratios


def ratio_mean(record: ProbeRecord, over: str | None, under: str | None, robust: bool = False) -> Measured:
    """Return the geometric mean of `spread_ratios` over the layers where both spreads are finite."""
    return over_layers(spread_ratios(record, over, under, robust).values(), geometric=True)


def lowest_support(record: ProbeRecord, name: str | None) -> Spectrum | None:
    """Return the layer spectrum of a tensor with the lowest support."""
    return min(layers_of(record, name), key=lambda s: s.support, default=None)


def classic_kinds(record: ProbeRecord) -> list[str]:
    """Return the kinds that the original probe reported, in their order."""
    return list(dict.fromkeys(row.kind for row in record.classic))


def classic_row(record: ProbeRecord, kinds: tuple[str, ...], repeated: bool = False) -> ClassicRow | None:
    """Return the row of the original probe for the first of `kinds` that has one.

    Args:
        record: The probe record.
        kinds: Kinds in order of preference.
        repeated: Return the row of the repeated sentences instead of that of the record's own text.
    """
    for kind in kinds:
        for row in record.classic:
            if row.kind == kind and ("repeated" in row.text) == repeated:
                return row
    return None


def classic_tensor(record: ProbeRecord, kind: str) -> str | None:
    """Return the tensor that the original probe measured for `kind`: as cached, after rotation."""
    chosen = pair(record)
    if kind.startswith("keys"):
        return chosen.key_cached
    return next((n for n in (kind, f"{kind}_post_rope") if n in record.names), None)


def classic_doubtful(record: ProbeRecord, row: ClassicRow) -> bool:
    """Return whether a row of the original probe has fewer than ten independent vectors per dimension."""
    spectra = layers_of(record, classic_tensor(record, row.kind))
    if "repeated" in row.text or not spectra:
        return True
    return any(s.support < ROOMY for s in spectra)


def classic_trivial(record: ProbeRecord, row: ClassicRow) -> bool:
    """Return whether energy@32 is 1 by definition, because the tensor is at most 32 wide."""
    spectra = layers_of(record, classic_tensor(record, row.kind))
    return bool(spectra) and max(s.width for s in spectra) <= CLASSIC_K


def held_out_energy_32(record: ProbeRecord, kind: str) -> Measured:
    """Return the mean held-out energy@32 before rotation of the tensor that the original probe measured."""
    tensor = classic_tensor(record, kind)
    if kind == "keys":
        tensor = pair(record).key_before
    spectra = layers_of(record, tensor)
    return over_layers(held_out_at(s, CLASSIC_K) for s in spectra) if spectra else NOTHING


def all_warnings(record: ProbeRecord) -> list[str]:
    """Return the warnings of a record and of its text, each once."""
    return list(dict.fromkeys([*record.warnings, *record.corpus.warnings]))
