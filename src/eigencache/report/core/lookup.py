"""Which spectra of a record answer which question: the key before rotation, the key as cached, the value, the latent."""

from dataclasses import dataclass

from eigencache.records.probe import ClassicRow, ProbeRecord, Spectrum
from eigencache.report.core.measured import NOTHING, ROOMY, Measured, of_spectrum, over_layers

CLASSIC_K = 32


@dataclass(frozen=True)
class Pair:
    """The tensors compared in one line of a table, by name; for models without rotation the two keys are the same."""

    key_before: str | None  # keys_pre_rope, keys, or keys_nope
    key_cached: str | None  # keys_post_rope, keys, or keys_nope
    value: str | None

    @property
    def rotated(self) -> bool:
        """Whether the key has a frame after rotation of its own."""
        return self.key_before != self.key_cached


def pair(record: ProbeRecord) -> Pair:
    """Keys and values of a record; of an MLA model the expanded ones (`keys_nope` is never rotated)."""
    names = record.names
    before = next((n for n in ("keys_pre_rope", "keys", "keys_nope") if n in names), None)
    cached = next((n for n in ("keys_post_rope", "keys", "keys_nope") if n in names), None)
    return Pair(before, cached, "values" if "values" in names else None)


def layers_of(record: ProbeRecord, name: str | None, centered: bool = True) -> list[Spectrum]:
    """The spectra of one tensor at scope `layer`, in the order of the layers."""
    found = record.select(name, "layer", centered=centered) if name else []
    return sorted(found, key=lambda s: s.layer_idx or 0)


def layer_indices(record: ProbeRecord) -> list[int]:
    """Indices of the layers that have a spectrum at scope `layer`."""
    return sorted({s.layer_idx for s in record.select(scope="layer", centered=None) if s.layer_idx is not None})


def quarter_k(spectrum: Spectrum) -> int:
    """The largest recorded k that is at most a quarter of the width (at least 1)."""
    return max((k for k in spectrum.energy if k <= max(1, spectrum.width // 4)), default=min(spectrum.energy))


def sensible_k(spectrum: Spectrum) -> int:
    """32, as the old tables have it, where the spectrum is wider than that; a quarter of the width otherwise."""
    return CLASSIC_K if spectrum.width > CLASSIC_K and CLASSIC_K in spectrum.energy else quarter_k(spectrum)


def energy_at(spectrum: Spectrum, k: int) -> Measured:
    """In-sample energy@k, None below one vector per dimension: there it is near 1 whatever was measured."""
    return of_spectrum(spectrum, spectrum.energy.get(k) if spectrum.support >= 1 else None)


def held_out_at(spectrum: Spectrum, k: int) -> Measured:
    """Held-out energy@k of one spectrum, None where there was no second half to hold out."""
    return of_spectrum(spectrum, (spectrum.held_out_energy or {}).get(k))


@dataclass(frozen=True)
class Shared:
    """A mean over layers of an energy, with the k and the width it belongs to."""

    measured: Measured
    k: int | None
    width: int | None

    @property
    def label(self) -> str:
        """`@32 of 128`."""
        return f"@{self.k} of {self.width}" if self.k else ""


def held_out_mean(record: ProbeRecord, name: str | None, quarter: bool = False) -> Shared:
    """Mean over layers of the held-out energy at one k that suits all layers of the tensor."""
    spectra = layers_of(record, name)
    if not spectra:
        return Shared(NOTHING, None, None)
    narrowest = min(spectra, key=lambda s: s.width)
    k = quarter_k(narrowest) if quarter else sensible_k(narrowest)
    return Shared(over_layers(held_out_at(s, k) for s in spectra), k, narrowest.width)


def rank_mean(record: ProbeRecord, name: str | None) -> Measured:
    """Mean over layers of the effective rank (Roy & Vetterli) of one tensor."""
    return over_layers(of_spectrum(s, s.effective_rank) for s in layers_of(record, name))


def spread_ratios(record: ProbeRecord, over: str | None, under: str | None, robust: bool = False) -> dict[int, Measured]:
    """Per layer: spread of one tensor over that of another; `robust` takes the 95th to 5th percentile spread."""
    below = {s.layer_idx: s for s in layers_of(record, under)}
    ratios: dict[int, Measured] = {}
    for s in layers_of(record, over):
        other = below.get(s.layer_idx)
        if other is None or s.layer_idx is None:
            continue
        a, b = (s.spread_p95_p5, other.spread_p95_p5) if robust else (s.spread, other.spread)
        known = a not in (0, float("inf")) and b not in (0, float("inf"))
        ratios[s.layer_idx] = Measured(a / b if known else None, min(s.support, other.support) < ROOMY)
    return ratios


def ratio_mean(record: ProbeRecord, over: str | None, under: str | None, robust: bool = False) -> Measured:
    """Geometric mean over layers of the ratio of two spreads; layers with an infinite spread have none."""
    return over_layers(spread_ratios(record, over, under, robust).values(), geometric=True)


def lowest_support(record: ProbeRecord, name: str | None) -> Spectrum | None:
    """The layer spectrum of a tensor that the least data stands behind."""
    return min(layers_of(record, name), key=lambda s: s.support, default=None)


def classic_kinds(record: ProbeRecord) -> list[str]:
    """The kinds of the historic rows, in their order."""
    return list(dict.fromkeys(row.kind for row in record.classic))


def classic_row(record: ProbeRecord, kinds: tuple[str, ...], repeated: bool = False) -> ClassicRow | None:
    """The historic row of the first of `kinds` that has one, measured on the record's own text or on the repeated one."""
    for kind in kinds:
        for row in record.classic:
            if row.kind == kind and ("repeated" in row.text) == repeated:
                return row
    return None


def classic_tensor(record: ProbeRecord, kind: str) -> str | None:
    """The tensor that a historic row of `kind` looked at: as cached, after rotation."""
    chosen = pair(record)
    if kind.startswith("keys"):
        return chosen.key_cached
    return next((n for n in (kind, f"{kind}_post_rope") if n in record.names), None)


def classic_doubtful(record: ProbeRecord, row: ClassicRow) -> bool:
    """Whether a historic row rests on fewer than ten vectors per dimension of the tensor it looked at."""
    spectra = layers_of(record, classic_tensor(record, row.kind))
    if "repeated" in row.text or not spectra:
        return True
    return any(s.support < ROOMY for s in spectra)


def classic_trivial(record: ProbeRecord, row: ClassicRow) -> bool:
    """Whether energy@32 is 1 by definition, because the tensor is no wider than 32."""
    spectra = layers_of(record, classic_tensor(record, row.kind))
    return bool(spectra) and max(s.width for s in spectra) <= CLASSIC_K


def honest_energy(record: ProbeRecord, kind: str) -> Measured:
    """Held-out energy@32 before rotation of the tensor that a historic row looked at, mean over layers."""
    tensor = classic_tensor(record, kind)
    if kind == "keys":
        tensor = pair(record).key_before
    spectra = layers_of(record, tensor)
    return over_layers(held_out_at(s, CLASSIC_K) for s in spectra) if spectra else NOTHING


def loud_warnings(record: ProbeRecord) -> list[str]:
    """All warnings of a record, once each."""
    return list(dict.fromkeys([*record.warnings, *record.corpus.warnings]))
