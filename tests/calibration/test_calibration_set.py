"""A calibration set samples as much of its text as it is told to."""

import pytest
import torch

from eigencache.calibration.calibration_set import CalibrationSet
from eigencache.calibration.session import Session
from eigencache.errors import ModelError, TokenizerMismatchError
from stub_codecs import random_sequences, tiny_loaded


def test_fewer_vectors_are_sampled_evenly_over_the_text() -> None:
    sequences = random_sequences(*[40] * 32)
    whole = CalibrationSet(Session(tiny_loaded("llama")), sequences)
    few = CalibrationSet(whole.session, sequences, most_vectors=320)  # a quarter of 1,280 tokens
    assert few.samples.lengths == (40,) * 7 and few.held_out_samples.lengths == (40,)
    rows = torch.cat([torch.arange(i * 40, i * 40 + 40) for i in range(0, 28, 4)])
    assert torch.equal(few.samples.vectors(), whole.samples.vectors(rows))


def test_a_metric_is_measured_on_as_many_tokens_as_told() -> None:
    read: list[int] = []

    def on_progress(what: str, _done: int, of: int) -> None:
        if what == "fisher metric":
            read.append(of)

    for tokens in (80, 160):
        session = Session(tiny_loaded("llama"), batch_size=1, on_progress=on_progress)
        CalibrationSet(session, random_sequences(*[40] * 32), metric_tokens=tokens).metric("fisher")
    assert set(read) == {2, 4}  # sequences of 40 tokens


@pytest.mark.parametrize("name", ["gpt2", "opt", "mpt"])
def test_sequences_beyond_the_learned_positions_are_refused_before_a_pass(name: str) -> None:
    session = Session(tiny_loaded(name))
    CalibrationSet(session, random_sequences(*[64] * 16))
    with pytest.raises(ModelError, match=r"has 64 positions, the sequences 65 tokens. Use `max_length` ≤ 64"):
        CalibrationSet(session, random_sequences(*[65] * 16))


def test_token_ids_without_an_embedding_are_refused_before_a_pass() -> None:
    sequences = random_sequences(*[40] * 16)
    sequences.ids[3][7] = 100_000
    with pytest.raises(TokenizerMismatchError, match="token id 100000 is too large"):
        CalibrationSet(Session(tiny_loaded("llama")), sequences)
