"""Reproduce the original probe, so that its published tables can be checked against held-out statistics.

It uses centered vectors after RoPE, concatenates the heads of a layer, evaluates in-sample and averages over layers.
"Effective rank" is the rank at 99 % energy, and energy@32 above 0.8 is called compressible. On four sentences repeated to
fill 64 samples it measures the text: the rank of a centered covariance is below the number of distinct rows (THEORY 3.1).
"""

from collections.abc import Iterable
from statistics import fmean

import torch

from eigencache.records.probe import ClassicRow, Spectrum
from eigencache.spectral.spectrum import energy_shares, rank_at

COMPRESSIBLE_ABOVE = 0.8
SAMPLES = 64
SENTENCES = (
    "The quick brown fox jumps over the lazy dog.",
    "Machine learning models compress what they have seen.",
    "In the beginning there was light, and it was good.",
    "A cache stores keys and values for every token.",
)
_FRAMES = ("post_rope", "unrotated")


def classic_rows(spectra: Iterable[Spectrum], text: str) -> list[ClassicRow]:
    """Return one row per kind of tensor, from centered spectra at scope `layer` of tensors as cached by transformers.

    Args:
        spectra: Spectra of the probe.
        text: Description of the text.
    """
    by_kind: dict[str, list[Spectrum]] = {}
    for spectrum in spectra:
        if spectrum.scope == "layer" and spectrum.centered and spectrum.frame in _FRAMES and any(spectrum.eigenvalues):
            by_kind.setdefault(spectrum.kind, []).append(spectrum)
    rows = []
    for kind, layers in by_kind.items():
        values = [torch.tensor(layer.eigenvalues, dtype=torch.float64) for layer in layers]
        shares = [energy_shares(v) for v in values]
        energy_16, energy_32 = (fmean(float(s[min(k, len(s)) - 1]) for s in shares) for k in (16, 32))
        rows.append(
            ClassicRow(
                kind=kind,
                text=text,
                vectors=layers[0].vectors,
                energy_16=energy_16,
                energy_32=energy_32,
                rank_99=fmean(float(rank_at(v, 0.99)) for v in values),
                assessment="Compressible" if energy_32 > COMPRESSIBLE_ABOVE else "Not compressible",
            )
        )
    return rows
