"""Codecs with a known effect (none, or total loss), and models and texts to test them on."""

import functools
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from eigencache.codec.base import Cached, Encoded, layers_of
from eigencache.corpora.contexts import distinct_contexts
from eigencache.corpora.sequences import Sequences
from eigencache.geometry import geometry_from_config
from eigencache.models.load import LoadedModel, load
from eigencache.records.run import Corpus
from tiny_models import tiny


@dataclass(frozen=True)
class Identity:
    """Stores the cache in the model's dtype, without loss."""

    name: str = "identity"
    nbytes: int = 0

    def encode(self, cached: Cached, start: int) -> Encoded:
        tensors = {f"{i}.{slot}": x.clone() for i, slots in cached.items() for slot, x in enumerate(slots)}
        return Encoded(tensors, start, next(iter(cached.values()))[0].shape[2])

    def decode(self, encoded: Encoded) -> dict[int, tuple[Tensor, Tensor]]:
        return {i: (encoded.tensors[f"{i}.0"], encoded.tensors[f"{i}.1"]) for i in layers_of(encoded.tensors)}


@dataclass(frozen=True)
class Zeros(Identity):
    """Decodes zeros, which destroys whatever is read through the cache."""

    name: str = "zeros"

    def decode(self, encoded: Encoded) -> dict[int, tuple[Tensor, Tensor]]:
        return {i: (torch.zeros_like(k), torch.zeros_like(v)) for i, (k, v) in super().decode(encoded).items()}


@dataclass(frozen=True)
class NaNs(Identity):
    """Decodes NaN."""

    name: str = "nan"

    def decode(self, encoded: Encoded) -> dict[int, tuple[Tensor, Tensor]]:
        return {i: (k * torch.nan, v * torch.nan) for i, (k, v) in super().decode(encoded).items()}


@functools.cache
def bundled(name: str) -> LoadedModel:
    """Return a bundled model; tests share it and must not change it."""
    return load(name, device="cpu")


def tiny_loaded(name: str) -> LoadedModel:
    """Return a tiny random model without a tokenizer."""
    model = tiny(name)
    return LoadedModel(name, model, None, geometry_from_config(model.config))  # type: ignore[arg-type]


def random_sequences(*lengths: int, seed: int = 0, vocabulary: int = 100) -> Sequences:
    """Return random ids in sequences of the given lengths."""
    rng = np.random.default_rng(seed)
    ids = [rng.integers(1, vocabulary, length) for length in lengths]
    corpus = Corpus(
        name="random ids",
        sha256="0" * 64,
        tokens=sum(lengths),
        sequences=len(ids),
        max_length=max(lengths),
        distinct_token_ids=len(np.unique(np.concatenate(ids))),
        distinct_8grams=distinct_contexts(ids),
        repetition=0.0,
    )
    return Sequences(ids, corpus)
