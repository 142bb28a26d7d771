"""The verdict reads the probed text once: the bases come from the probe's moments, the loss from the cache."""

import pytest
import torch

from eigencache.calibration.moments import gather
from eigencache.calibration.session import Session
from eigencache.errors import CorpusError
from eigencache.fitting.pca import PCACalibration
from eigencache.fitting.pca_settings import PCASettings
from eigencache.models.capture import Capture
from eigencache.models.key_bias import key_biases
from eigencache.records.advice import Budget
from eigencache.records.base import SCOPES
from eigencache.studies.recommend.commands import Recipe
from eigencache.studies.recommend.verdict import judge, verdict_plans

pytestmark = pytest.mark.slow

BUDGET, RECIPE = Budget.of_ppl("5%"), Recipe("tiny", "stdlib", 2_048, 64)


@pytest.mark.parametrize("name", ["gpt2", "llama", "deepseek_v2"])
def test_moments_that_are_given_fit_the_same_codecs(name: str, loaded, sequences) -> None:
    model, text = loaded(name), sequences(*(64,) * 16)
    given = PCACalibration(Session(model), text, gathered=gather(Session(model), text, SCOPES))
    own = PCACalibration(Session(model), text, scopes=SCOPES)
    target = "latent" if name == "deepseek_v2" else "kv"
    for scope in SCOPES:
        settings = PCASettings(target, scope)
        for a, b in zip(given.fit(settings).groups, own.fit(settings).groups, strict=True):
            assert a.parts == b.parts
            assert torch.equal(a.transform.encoder, b.transform.encoder)


@pytest.mark.parametrize("name", ["gpt2", "llama", "qwen2", "deepseek_v2"])
def test_every_target_is_judged_without_reading_the_text_again(name: str, loaded, sequences, monkeypatch) -> None:
    model, text, held_out = loaded(name), sequences(*(64,) * 32), sequences(*(48,) * 9, seed=1)
    gathered = gather(Session(model), text, SCOPES)
    read = []
    run = Capture.run
    monkeypatch.setattr(Capture, "run", lambda self, ids, *rest: read.append(ids.numel()) or run(self, ids, *rest))
    advice = judge(
        Session(model, batch_size=4),
        gathered,
        held_out,
        BUDGET,
        RECIPE,
    )
    assert sum(read) <= 64 * 11  # the rotation, for PCA and for codecs, and means of keys from a few sequences
    record = advice.sweeps["given"]
    assert [(s.target, s.bits) for s in record.series] == [(p.settings.target, p.bits) for p in verdict_plans(model)]
    assert record.series[0].points[0].quality.tokens == 9 * (48 - 36 - 1)
    assert (advice.keys is not None) == bool(key_biases(model))
    stored, live = advice.codecs
    assert stored.candidates and all(c.choosing.tokens == 9 * (48 - 36 - 1) for c in stored.candidates)
    assert live.left_out == [
        "live: a prefix of 36 tokens is too short: no block of 64 tokens is ever packed. Use `prefix` ≥ 68."
    ]


def test_a_text_that_was_probed_is_not_scored(loaded, sequences) -> None:
    model, text = loaded("llama"), sequences(*(64,) * 32)
    with pytest.raises(CorpusError, match="choose another `text` or `held_out`"):
        judge(Session(model), gather(Session(model), text, SCOPES), text, BUDGET, RECIPE)
