"""A byte-level tokenizer of 400 entries, trained here, and a guard against access to the hub."""

import sys

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from eigencache.corpora import text as corpora_text

WORDS = "the cache of keys and values holds what the model has read so far, and a probe looks at it\n"


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE with an end-of-text token (id 0) and no beginning-of-text token."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        [WORDS],
        trainers.BpeTrainer(vocab_size=400, special_tokens=["<|end|>"], initial_alphabet=alphabet, show_progress=False),
    )
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|end|>")


@pytest.fixture
def make_text():
    """Make a `Text` of the given documents."""

    def make(*documents: str, name: str = "given") -> corpora_text.Text:
        return corpora_text.Text.scan(name, lambda: [corpora_text.Document(str(i), d) for i, d in enumerate(documents)])

    return make


@pytest.fixture(autouse=True)
def no_datasets(monkeypatch):
    """Hide the package `datasets`, unless a test replaces it by a fake."""
    monkeypatch.setitem(sys.modules, "datasets", None)
