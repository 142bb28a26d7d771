"""What is retrieved is retrieved from the cache; what a model cannot do is not held against a codec."""

import numpy as np
import pytest
import torch

from eigencache.calibration.session import Session
from eigencache.codec.base import SixteenBit
from eigencache.errors import CorpusError, ModelError
from eigencache.evaluate.divergence import generate_greedily
from eigencache.evaluate.prefix import Window, read_prefix
from eigencache.evaluate.retrieval import evaluate_retrieval, score_examples, wilson_interval
from eigencache.evaluate.tasks import Example, examples, vocabulary
from eigencache.records.quality import Retrieval
from stub_codecs import Identity, Zeros, bundled, tiny_loaded

CODECS = {"identity": Identity(), "16 bit": SixteenBit(), "zeros": Zeros()}


def test_copying_survives_identity_and_is_ruined_by_zeros() -> None:
    seen: list[tuple[int, int]] = []
    (found,) = evaluate_retrieval(
        Session(bundled("ref-llama"), on_progress=lambda _, done, of: seen.append((done, of))),
        CODECS,
        tasks=["copy"],
        lengths=[96],
        depths=[0.5],
        count=10,
    )
    identity, half, zeros = found.results
    assert found.applicable and found.uncompressed.accuracy >= 0.5
    assert identity.correct == found.uncompressed.correct and identity.interval == found.uncompressed.interval
    assert abs(half.correct - identity.correct) <= 1 and zeros.correct == 0
    assert (found.length, found.depth, found.answer_tokens, zeros.examples) == (96, 0.5, 8, 10)
    assert "zeros 0.00" in found.describe() and seen == [(1, 1)]
    assert Retrieval.model_validate_json(found.model_dump_json()) == found


def test_a_task_the_model_cannot_do_is_not_applicable_and_no_codec_is_scored() -> None:
    found = list(
        evaluate_retrieval(Session(bundled("ref-llama")), CODECS, tasks=["variable tracking"], lengths=[128], count=4)
    )
    assert len(found) == 1 and found[0].depth is None
    assert not found[0].applicable and found[0].results == []
    assert found[0].describe() == f"not applicable: uncompressed accuracy {found[0].uncompressed.accuracy:.2f}"


def test_the_rule_is_the_lower_end_of_the_interval_above_chance_and_a_tenth() -> None:
    loaded = tiny_loaded("llama")
    contexts = [np.random.default_rng(i).integers(1, 100, 12) for i in range(8)]
    with torch.no_grad():
        right = [int(loaded.model(input_ids=torch.from_numpy(c)[None]).logits[0, -1].argmax()) for c in contexts]

    def scored(correct: int, chance: float) -> Retrieval:
        answers = [np.array([answer if i < correct else (answer + 1) % 128]) for i, answer in enumerate(right)]
        made = [Example(c, a, chance) for c, a in zip(contexts, answers, strict=True)]
        return score_examples(
            Session(loaded, batch_size=3),
            {"identity": Identity()},
            made,
            task="made up",
        )

    assert scored(3, 0.0).uncompressed.correct == 3
    assert wilson_interval(2, 8)[0] < 0.1 < wilson_interval(3, 8)[0]
    assert not scored(2, 0.0).applicable and scored(3, 0.0).applicable
    assert scored(3, 0.0).results[0].correct == 3
    assert wilson_interval(6, 8)[0] < 0.5 and not scored(6, 0.5).applicable
    assert scored(8, 0.5).applicable and scored(8, 0.5).threshold == 0.5


@torch.no_grad()
def test_all_ranked_first_is_what_greedy_generation_answers() -> None:
    loaded = bundled("ref-llama")
    made = examples("copy", vocabulary(loaded), 64, 0.5, 8, 1)
    ids = torch.from_numpy(np.stack([example.context for example in made]))
    answers = generate_greedily(read_prefix(loaded, ids[:, :-1]), ids, None, 8)
    exact = sum(answer.tolist() == example.answer.tolist() for answer, example in zip(answers, made, strict=True))
    assert score_examples(Session(loaded), {}, made, task="copy").uncompressed.correct == exact > 0


def test_a_window_over_the_whole_context_hides_the_codec() -> None:
    loaded = bundled("ref-llama")
    made = examples("copy", vocabulary(loaded), 64, 0.5, 6, 0)
    found = score_examples(Session(loaded), {"zeros": Zeros()}, made, task="copy", window=Window(64))
    assert found.applicable and found.results[0].correct == found.uncompressed.correct


def test_wilson_intervals_are_the_published_ones() -> None:
    for successes, trials, expected in [(0, 10, (0.0, 0.2775)), (81, 263, (0.2553, 0.3662)), (15, 148, (0.0624, 0.1605))]:
        assert wilson_interval(successes, trials) == pytest.approx(expected, abs=5e-5)
    assert wilson_interval(10, 10) == pytest.approx((1 - 0.2775, 1.0), abs=5e-5)


def test_what_cannot_be_asked_is_refused_in_one_line() -> None:
    with pytest.raises(ModelError, match="positions"):
        next(evaluate_retrieval(Session(bundled("ref-gpt2")), {}, tasks=["copy"], lengths=[100_000], count=1))
    with pytest.raises(CorpusError, match="`tasks` sorting: no such task"):
        next(evaluate_retrieval(Session(bundled("ref-llama")), {}, tasks=["sorting"]))
    with pytest.raises(CorpusError, match="`examples` 0"):
        next(evaluate_retrieval(Session(bundled("ref-llama")), {}, count=0))
