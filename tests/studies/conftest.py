"""Tiny models and random sequences, as the probe takes them."""

from collections.abc import Callable

import pytest
from transformers import PreTrainedModel

from eigencache.corpora.sequences import Sequences
from eigencache.geometry import geometry_from_config
from eigencache.models.load import LoadedModel, with_evidence
from known import random_sequences
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

    return random_sequences
