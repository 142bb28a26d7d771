"""What makes caches of its own is scored like a codec: by likelihood, divergence and retrieval, its own bytes counted."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from eigencache.calibration.session import Session
from eigencache.codec.base import CacheMaker, SixteenBit
from eigencache.errors import CodecError
from eigencache.evaluate.divergence import measure_divergence
from eigencache.evaluate.likelihood import UNCOMPRESSED, score_through_cache
from eigencache.evaluate.prefix import Prefix, Window, read_prefix
from eigencache.evaluate.retrieval import score_examples
from eigencache.evaluate.tasks import Example
from eigencache.models.caches.measuring_cache import plain_cache
from eigencache.records.quality import ReadingProtocol
from stub_codecs import Identity, random_sequences, tiny_loaded
from tiny_models import token_ids


@dataclass(frozen=True)
class Scaled:
    """An ordinary cache whose values are multiplied: by one nothing happens, by zero whoever reads it is ruined."""

    factor: float = 1.0
    name: str = "scaled"
    nbytes: int = 7

    def cache_of(self, prefix: Prefix) -> Any:
        assert prefix.ids.shape[1] == prefix.stored[0][0].shape[2]
        return plain_cache(prefix.loaded.model, {i: (k, v * self.factor) for i, (k, v) in prefix.stored.items()})

    def held(self, cache: Any) -> tuple[int, int]:
        return cache.get_seq_length() * len(cache.layers[0].keys), 1000 + cache.get_seq_length()


SAME, RUINED = Scaled(), Scaled(0.0)
LLAMA, TEXT = tiny_loaded("llama"), random_sequences(24, 24, 24)


def test_codecs_are_no_cache_makers() -> None:
    assert isinstance(SAME, CacheMaker)
    assert not isinstance(SixteenBit(), CacheMaker)


def test_likelihood_scores_its_cache_and_asks_its_bytes_before_anything_is_read() -> None:
    codecs = {"same": SAME, "identity": Identity(), "ruined": RUINED}
    for scored in score_through_cache(
        Session(LLAMA, batch_size=2),
        TEXT,
        codecs,
        ReadingProtocol(kind="prefix", length=12),
    ):
        rows = len(scored.losses[UNCOMPRESSED])
        assert scored.losses["same"] == scored.losses["identity"]
        assert all(loss.kl > 1e-2 for loss in scored.losses["ruined"])
        assert scored.held["same"] == (12 * rows, 1012)
        assert scored.held["identity"][0] == 12 * rows


def test_it_is_scored_behind_whole_prefixes_only_and_has_no_window() -> None:
    with pytest.raises(CodecError, match="same needs a whole prefix"):
        list(score_through_cache(Session(LLAMA), TEXT, {"same": SAME}, ReadingProtocol(kind="chunked", length=5)))
    with pytest.raises(CodecError, match="`window`: scaled makes its own cache"):
        read_prefix(LLAMA, token_ids()[:, :8]).cache(SAME, Window(4))


def test_generation_and_retrieval_read_it() -> None:
    same, ruined = measure_divergence(
        Session(LLAMA, batch_size=2),
        TEXT,
        {"same": SAME, "ruined": RUINED},
        prompts=3,
        prompt_tokens=12,
        new_tokens=6,
    )
    assert same.tokens_until_parting == [6, 6, 6]
    assert min(ruined.tokens_until_parting) < 6
    with torch.no_grad():
        ids = token_ids()
        answers = read_prefix(LLAMA, ids[:, :-1]).logits(ids[:, -1:], None).argmax(-1)
    made = [Example(context, answer, chance=0.0) for context, answer in zip(ids.numpy(), answers.numpy(), strict=True)]
    found = score_examples(Session(LLAMA), {"same": SAME, "ruined": RUINED}, made, task="own answers")
    assert found.uncompressed.correct == len(made)
    assert found.applicable
    assert found.results[0].correct == len(made)
