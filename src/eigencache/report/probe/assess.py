"""A verdict always comes from this record's numbers, with the reason: never from a table of model names.

A tensor counts as compressible by truncation when a quarter of its dimensions holds at least 80 % of the energy of
text that the basis has not seen (held out, centered, heads of a layer joined, mean over layers). 0.8 is the threshold
of the historic probe; the historic probe asked it of in-sample energy at k = 32, whatever the width. A verdict needs
ten independent vectors per dimension in every layer (THEORY 3.1).
"""

from dataclasses import dataclass

from eigencache.records.probe import ProbeRecord
from eigencache.report.core.lookup import Pair, Shared, held_out_mean, lowest_support, pair
from eigencache.report.core.measured import ROOMY, share

THRESHOLD = 0.8
UNSUPPORTED = "not supported by this data"
RULE = (
    f"compressible: a quarter of the dimensions holds at least {THRESHOLD:.0%} of the held-out energy (centered, heads of a "
    "layer joined, mean over layers). Energy is not quality: measure the loss through the cache before relying on it"
)


@dataclass(frozen=True)
class Assessment:
    """What the numbers say about compressing a cache by truncation, and which numbers say it."""

    verdict: str
    reasons: tuple[str, ...]

    @property
    def supported(self) -> bool:
        """Whether the data supports a verdict on every tensor that was asked about."""
        return UNSUPPORTED not in self.verdict


@dataclass(frozen=True)
class _Finding:
    """One tensor: compressible, not compressible, or None where the data cannot say; and the sentence behind it."""

    compressible: bool | None
    reason: str


def _find(record: ProbeRecord, name: str) -> _Finding:
    found: Shared = held_out_mean(record, name, quarter=True)
    weakest = lowest_support(record, name)
    if weakest is None:
        return _Finding(None, f"{name}: was not measured per layer")
    energy = f"{name}: held-out energy{found.label} is {found.measured.text(share)}"
    if weakest.support < ROOMY or found.measured.value is None:
        behind = f"{weakest.support:.2g} independent vectors per dimension in layer {weakest.layer_idx}"
        if weakest.support >= ROOMY:
            return _Finding(None, f"{name}: no sequences were held out in layer {weakest.layer_idx}")
        seen = f" ({energy})" if found.measured.value is not None else ""
        return _Finding(None, f"{name}: {behind}, at least {ROOMY:.0f} are needed{seen}")
    enough = found.measured.value >= THRESHOLD
    return _Finding(enough, f"{energy}, {'at least' if enough else 'below'} {THRESHOLD}")


def _phrase(letter: str, before: bool | None, cached: bool | None) -> str:
    """What is true of keys (or values) before and after rotation, in words."""
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
        f"KV width / hidden size is {ratio:.2f}: before K norm and rotation, K and V of a layer are linear in its hidden "
        f"state, so {1 - 1 / ratio:.0%} of the cache is redundant by algebra"
    ]


def _rotation_reason(record: ProbeRecord) -> list[str]:
    shares = [frame.rotated_mean_share for frame in record.frames]
    if not shares:
        return []
    kind = "rotary key" if record.model.geometry.mla else "K"
    return [
        f"rotation of a shared mean makes {sum(shares) / len(shares):.0%} of the post-RoPE {kind} variance (mean of layers)"
    ]


def assess(record: ProbeRecord) -> Assessment:
    """The verdict follows the held-out energies: the same model with other numbers is judged otherwise."""
    chosen: Pair = pair(record)
    if "latent" in record.names:
        latent = _find(record, "latent")
        words = {True: "latent compressible", False: "latent not compressible", None: UNSUPPORTED}
        return Assessment(words[latent.compressible], (latent.reason, *_rotation_reason(record)))
    if chosen.key_before is None or chosen.key_cached is None or chosen.value is None:
        return Assessment(UNSUPPORTED, ("keys and values were not both measured",))
    before, values = _find(record, chosen.key_before), _find(record, chosen.value)
    cached = _find(record, chosen.key_cached) if chosen.rotated else before
    verdict = _join(
        _phrase("K", before.compressible, cached.compressible), _phrase("V", values.compressible, values.compressible)
    )
    findings = [before, cached, values] if chosen.rotated else [before, values]
    return Assessment(verdict, (*(f.reason for f in findings), *_width_reason(record), *_rotation_reason(record)))
