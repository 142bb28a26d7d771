"""The memory of passes is predicted in proportion to their tokens, and what does not fit is refused before it runs."""

import pytest

from eigencache.calibration.pass_memory import backward_nbytes, beside_a_pass, forward_nbytes, scoring_nbytes
from eigencache.calibration.session import Session
from eigencache.errors import StatisticsError
from eigencache.evaluate.likelihood import scored_batches
from eigencache.records.quality import ReadingProtocol
from stub_codecs import random_sequences, tiny_loaded


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma3_text", "deepseek_v3"])
def test_a_pass_takes_memory_in_proportion_to_its_tokens(name: str) -> None:
    loaded = tiny_loaded(name)
    assert forward_nbytes(loaded, 300) == 3 * forward_nbytes(loaded, 100) > 300 * 4 * loaded.geometry.values_per_token
    assert backward_nbytes(loaded, 200) > backward_nbytes(loaded, 100) > forward_nbytes(loaded, 100)


def test_logits_are_bounded_in_a_backward_pass() -> None:
    loaded = tiny_loaded("llama")
    per_token = [backward_nbytes(loaded, n) / n for n in (10**4, 10**6, 10**7)]
    assert per_token[0] > per_token[1] > per_token[2]


def test_scoring_takes_as_many_sequences_as_their_logits_allow(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = tiny_loaded("llama")
    monkeypatch.setattr("eigencache.calibration.pass_memory.LOGITS", 3 * 20 * loaded.embedded_ids)
    sizes = [scoring_nbytes(loaded, batch, 40) for batch in (1, 2, 3, 8)]
    assert sizes[1] == 2 * sizes[0] and sizes[2] == sizes[3] == 3 * sizes[0]
    assert scoring_nbytes(loaded, 8, 400) > 10 * sizes[0] / 2  # one sequence at least


def test_scoring_that_does_not_fit_is_refused_before_it_runs() -> None:
    loaded, text = tiny_loaded("llama"), random_sequences(*[40] * 5)
    protocol = ReadingProtocol(kind="prefix", length=30)
    needed = scoring_nbytes(loaded, 2, 40, 10)
    assert len(scored_batches(Session(loaded, 2, memory=needed), text, protocol)) == 3
    words = (
        r"Scoring 10 tokens after 30 needs about \S+ GiB beside the model for 2 sequences at a time, more than a `memory`"
    )
    with pytest.raises(StatisticsError, match=words):
        scored_batches(Session(loaded, 2, memory=needed - 1), text, protocol)


def test_what_a_pass_leaves_is_for_statistics() -> None:
    loaded, text = tiny_loaded("llama"), random_sequences(*[40] * 5)
    for batch_size, tokens in ((2, 80), (8, 200)):
        left = beside_a_pass(Session(loaded, batch_size, memory=10**9), text)
        assert left == 10**9 - forward_nbytes(loaded, tokens)


def test_a_pass_that_does_not_fit_is_refused_with_its_numbers() -> None:
    loaded, text = tiny_loaded("llama"), random_sequences(*[40] * 5)
    needed = forward_nbytes(loaded, 200)
    words = r"A pass of 5 sequences of 40 tokens needs about \S+ GiB .* a `memory` of \S+ GiB\. Raise `memory`"
    with pytest.raises(StatisticsError, match=words):
        beside_a_pass(Session(loaded, memory=needed - 1), text)
    assert beside_a_pass(Session(loaded, memory=needed), text) == 0
