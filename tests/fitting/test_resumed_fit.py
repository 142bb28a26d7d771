"""An interrupted fit resumes to the codec of an uninterrupted one, without measuring metric and vectors again."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from eigencache.calibration.session import Session
from eigencache.fitting.eigen import EigenSettings
from eigencache.fitting.fit import FitResult, Goal, LiveGoal, fit_codec, fit_live_codec
from stub_codecs import random_sequences, tiny_loaded

TEXT, STAGE = random_sequences(*[160] * 16), "fitting"
SESSION = Session(tiny_loaded("llama"))


def stored(session: Session, partial: Path | None) -> FitResult:
    return fit_codec(session, TEXT, EigenSettings(text=False), Goal(bits=4.0), partial=partial)


def live(session: Session, partial: Path | None) -> FitResult:
    return fit_live_codec(session, TEXT, LiveGoal(bits=4.0), partial=partial)


@pytest.mark.parametrize("fitted", [stored, live])
def test_an_interrupted_fit_resumes_to_the_same_codec(tmp_path: Path, fitted) -> None:
    reported: list[str] = []

    def interrupt(what: str, _done: int, _of: int) -> None:
        if what.startswith(STAGE):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fitted(replace(SESSION, on_progress=interrupt), tmp_path / "partial")
    resumed = fitted(replace(SESSION, on_progress=lambda what, _done, _of: reported.append(what)), tmp_path / "partial")
    whole = fitted(SESSION, None)
    assert "fisher metric, kept by an interrupted fit" in reported and "vectors, kept by an interrupted fit" in reported
    assert not {"fisher metric", "vectors"} & set(reported)
    if whole.codec:
        assert resumed.codec.sha256 == whole.codec.sha256
    else:
        for one, other in zip(resumed.live.codec.tensors(), whole.live.codec.tensors(), strict=True):
            assert torch.equal(one, other)
