"""Tiny models and random sequences, as the probe takes them."""

from collections.abc import Callable

import numpy as np
import pytest
from transformers import PreTrainedModel

from eigencache.corpora.contexts import distinct_contexts
from eigencache.corpora.sequences import Sequences
from eigencache.geometry import geometry_from_config
from eigencache.models.load import LoadedModel, with_evidence
from eigencache.records import Corpus
from tiny_models import tiny

Loader = Callable[..., LoadedModel]


@pytest.fixture
def loaded() -> Loader:
    """A tiny model by name, or a model object, without a tokenizer: it is given ids."""

    def load(model: str | PreTrainedModel) -> LoadedModel:
        model = tiny(model) if isinstance(model, str) else model
        return LoadedModel("tiny", model, None, with_evidence(geometry_from_config(model.config), model))  # type: ignore[arg-type]

    return load


@pytest.fixture
def sequences() -> Callable[..., Sequences]:
    """Random ids in sequences of the given lengths."""

    def make(*lengths: int, seed: int = 0, vocabulary: int = 100) -> Sequences:
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

    return make
