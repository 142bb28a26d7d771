"""Fixtures of all tests. One thread per test process: two processes beat two threads."""

from collections.abc import Callable

import pytest
import torch
from transformers import PreTrainedModel

from eigencache.corpora.sequences import Sequences
from eigencache.geometry import geometry_from_config
from eigencache.models.load import LoadedModel, with_evidence
from stub_codecs import random_sequences
from tiny_models import tiny

torch.set_num_threads(1)

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
