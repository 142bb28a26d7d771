"""Reproduce the original probe, so that its published tables can be checked against held-out statistics.

It uses centered vectors after RoPE, concatenates the heads of a layer, evaluates in-sample and averages over layers.
"Effective rank" is the rank at 99 % energy, and energy@32 above 0.8 is called compressible. Its text is 64 samples of 256
tokens, of which four differ: each is one sentence, repeated 20 times and cut. So it has about 40 distinct tokens and at most
1,024 distinct vectors, and it measures that text (THEORY 3.1).
"""

from collections.abc import Iterable
from statistics import fmean

import torch

from eigencache.models.load import LoadedModel
from eigencache.records.probe import ClassicRow, Spectrum
from eigencache.spectral.spectrum import energy_shares, rank_at

COMPRESSIBLE_ABOVE = 0.8
SAMPLES, SAMPLE_TOKENS, REPEATS = 64, 256, 20
REPEATED = "four repeated sentences"
SENTENCES = (
    "The quick brown fox jumps over the lazy dog.",
    "Machine learning models compress what they have seen.",
    "In the beginning there was light, and it was good.",
    "A cache stores keys and values for every token.",
)
_FRAMES = ("post_rope", "unrotated")


def repeated_samples(loaded: LoadedModel) -> list[list[int]]:
    """Return the distinct samples of the original text as token ids, without special tokens.

    Args:
        loaded: A model with its tokenizer. Fewer than 256 learned positions shorten the samples.
    """
    tokens = min(SAMPLE_TOKENS, loaded.learned_positions or SAMPLE_TOKENS)
    samples = []
    for sentence in SENTENCES:
        ids = list(loaded.tokenizer(f"{sentence} " * REPEATS, add_special_tokens=False)["input_ids"])
        samples.append((ids * (tokens // len(ids) + 1))[:tokens])
    return samples


def distinct_contexts(samples: Iterable[list[int]]) -> int:
    """Return the number of distinct prefixes of the samples: equal prefixes have equal vectors."""
    return len({tuple(sample[: end + 1]) for sample in samples for end in range(len(sample))})


def classic_rows(
    spectra: Iterable[Spectrum], text: str, *, copies: int = 1, distinct: int | None = None
) -> list[ClassicRow]:
    """Return one row per kind of tensor, from centered spectra at scope `layer` of tensors as cached by transformers.

    Args:
        spectra: Spectra of the probe.
        text: Description of the text.
        copies: Number of times that the original probe read the text. Equal copies do not change a covariance.
        distinct: Number of distinct vectors of the text, if they were counted.
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
                vectors=copies * layers[0].vectors,
                distinct_vectors=distinct,
                energy_16=energy_16,
                energy_32=energy_32,
                rank_99=fmean(float(rank_at(v, 0.99)) for v in values),
                assessment="Compressible" if energy_32 > COMPRESSIBLE_ABOVE else "Not compressible",
            )
        )
    return rows
