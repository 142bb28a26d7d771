"""Assess from the numbers of a probe record whether its cache can be compressed by truncation.

A tensor counts as compressible if a quarter of its dimensions holds at least 80 % of the held-out energy (centered,
heads of a layer concatenated, mean over layers). The original probe used the same threshold, but on in-sample energy
at k = 32 for every width. A verdict needs ten independent vectors per dimension in every layer (THEORY 3.1).
"""

from dataclasses import dataclass

from eigencache.records.probe import ProbeRecord
from eigencache.report.core.lookup import MeanEnergy, Pair, held_out_mean, lowest_support, pair
from eigencache.report.core.measured import ROOMY, share

THRESHOLD = 0.8
UNSUPPORTED = "too little data for a verdict"
RULE = (
    f"compressible: a quarter of the dimensions holds at least {THRESHOLD:.0%} of the held-out energy (centered, heads of a "
    "layer concatenated, mean over layers). Energy does not predict the loss: measure it with `eigencache sweep`"
)


@dataclass(frozen=True)
class Assessment:
    """The verdict on compressing a cache by truncation, with the numbers that it rests on."""

    verdict: str
    reasons: tuple[str, ...]

    @property
    def supported(self) -> bool:
        """Whether every tensor has enough data for a verdict."""
        return UNSUPPORTED not in self.verdict


@dataclass(frozen=True)
class _Finding:
    """The verdict on one tensor, with its reason."""

    compressible: bool | None  # None: too little data
    reason: str


def _find(record: ProbeRecord, name: str) -> _Finding:
    energy_mean: MeanEnergy = held_out_mean(record, name, quarter=True)
    weakest = lowest_support(record, name)
    if weakest is None:
        return _Finding(None, f"{name}: not measured per layer")
    energy = f"{name}: held-out energy{energy_mean.label} is {energy_mean.measured.text(share)}"
    if weakest.support < ROOMY or energy_mean.measured.value is None:
        support = f"{weakest.support:.2g} independent vectors per dimension in layer {weakest.layer_idx}"
        if weakest.support >= ROOMY:
            return _Finding(None, f"{name}: no sequences were held out in layer {weakest.layer_idx}")
        measured = f" ({energy})" if energy_mean.measured.value is not None else ""
        return _Finding(None, f"{name}: {support}, at least {ROOMY:.0f} are needed{measured}")
    enough = energy_mean.measured.value >= THRESHOLD
    return _Finding(enough, f"{energy}, {'at least' if enough else 'below'} {THRESHOLD}")


def _phrase(letter: str, before: bool | None, cached: bool | None) -> str:
    """Phrase the verdicts on keys (or values) before rotation and as cached."""
    if before is None or cached is None:
        return f"{letter} {UNSUPPORTED}"
    if before and cached:
        return f"{letter} compressible"
    if before:
        return f"{letter} pre-RoPE only"
    return f"{letter} post-RoPE only" if cached else f"{letter} not compressible"


def _join(keys: str, values: str) -> str:
    whole = {
        ("K compressible", "V compressible"): "K and V compressible",
        ("K not compressible", "V not compressible"): "neither K nor V compressible",
        (f"K {UNSUPPORTED}", f"V {UNSUPPORTED}"): UNSUPPORTED,
    }
    return whole.get((keys, values), f"{values}, {keys}")


def _width_reason(record: ProbeRecord) -> list[str]:
    geometry = record.model.geometry
    ratio = geometry.width_ratio
    if geometry.mla or ratio <= 1:
        return []
    return [
        f"KV width / hidden size is {ratio:.2f}: before K norm and rotation, K and V of a layer are linear functions of "
        f"its hidden state, so {1 - 1 / ratio:.0%} of the cache is redundant"
    ]


def _rotation_reason(record: ProbeRecord) -> list[str]:
    shares = [frame.rotated_mean_share for frame in record.frames]
    if not shares:
        return []
    kind = "rotary key" if record.model.geometry.mla else "K"
    return [
        f"rotating a shared mean causes {sum(shares) / len(shares):.0%} of the post-RoPE {kind} variance (mean over layers)"
    ]


def assess(record: ProbeRecord) -> Assessment:
    """Return the verdict on the cache of a record; it depends on the held-out energies, not on the name of the model."""
    chosen: Pair = pair(record)
    if "latent" in record.names:
        latent = _find(record, "latent")
        words = {True: "latent compressible", False: "latent not compressible", None: UNSUPPORTED}
        return Assessment(words[latent.compressible], (latent.reason, *_rotation_reason(record)))
    if chosen.key_before is None or chosen.key_cached is None or chosen.value is None:
        return Assessment(UNSUPPORTED, ("keys and values must both be measured",))
    before, values = _find(record, chosen.key_before), _find(record, chosen.value)
    cached = _find(record, chosen.key_cached) if chosen.rotated else before
    verdict = _join(
        _phrase("K", before.compressible, cached.compressible), _phrase("V", values.compressible, values.compressible)
    )
    findings = [before, cached, values] if chosen.rotated else [before, values]
    return Assessment(verdict, (*(f.reason for f in findings), *_width_reason(record), *_rotation_reason(record)))
