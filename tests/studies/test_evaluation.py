"""An evaluation looks at a codec from every side, goes on where it stopped, and prints what it found."""

from pathlib import Path

import pytest

from eigencache.calibration.session import Session
from eigencache.corpora.resolve import read_text
from eigencache.corpora.sequences import pack
from eigencache.errors import CorpusError
from eigencache.fitting.pca import PCACalibration
from eigencache.fitting.pca_settings import PCASettings
from eigencache.records.quality import EvaluationRecord, ReadingProtocol
from eigencache.report.quality.evaluation import evaluation_tables
from eigencache.studies.evaluation import evaluate_codecs
from stub_codecs import bundled

pytestmark = pytest.mark.slow

PROTOCOLS = (ReadingProtocol(kind="prefix", length=48), ReadingProtocol(kind="chunked", length=32, window=16))


@pytest.fixture(scope="module")
def calibration() -> PCACalibration:
    loaded = bundled("ref-llama")
    return PCACalibration(Session(loaded), pack(read_text("stdlib"), loaded.tokenizer, tokens=8192, max_length=256))


@pytest.fixture(scope="module")
def text():
    return pack(read_text("stdlib:held-out"), bundled("ref-llama").tokenizer, tokens=96 * 9, max_length=96)


def evaluated(calibration: PCACalibration, text, **options) -> EvaluationRecord:
    full = calibration.fit(PCASettings("kv", sinks=0))
    codecs = {"full": full, "rank 4": full.truncated(4)}
    few = {"prompts": 2, "tasks": ("copy",), "lengths": (64,), "examples": 8}
    progress = {name: options.pop(name) for name in ("on_progress",) if name in options}
    session = Session(calibration.session.loaded, batch_size=4, **progress)
    return evaluate_codecs(session, text, calibration, codecs, PROTOCOLS, **(few | options))


def test_full_rank_keeps_what_the_model_says_and_rank_4_does_not(calibration, text) -> None:
    record = evaluated(calibration, text)
    for part in record.likelihood:
        full, low = part.results
        assert abs(full.delta_nll) < 2e-3
        assert low.delta_nll > 0.05
        assert low.compression_ratio == pytest.approx(8)
    full, low = record.divergence
    assert full.mean_agreement > low.mean_agreement
    for one in record.retrieval:
        assert not one.applicable or one.results[0].correct >= one.results[1].correct
    assert record.ledgers["rank 4"][0].ratio == pytest.approx(8)
    tables = evaluation_tables(record)
    assert len(tables) == 4
    assert [row[0] for row in tables[0].rows] == ["full", "rank 4"] * 2


def test_an_interrupted_evaluation_continues_to_the_same_record(calibration, text, tmp_path: Path) -> None:
    def stop(what: str, done: int, of: int) -> None:
        if what == "generation":
            raise KeyboardInterrupt

    path = tmp_path / "partial"
    with pytest.raises(KeyboardInterrupt):
        evaluated(calibration, text, partial=path, on_progress=stop)
    seen: list[str] = []
    resumed = evaluated(calibration, text, partial=path, on_progress=lambda what, done, of: seen.append(what))
    assert set(seen) == {"generation", "retrieval"}
    assert resumed.likelihood == evaluated(calibration, text, prompts=0, tasks=()).likelihood


def test_a_record_survives_json_and_parts_can_be_left_out(calibration, text, tmp_path: Path) -> None:
    record = evaluated(calibration, text, prompts=0, tasks=())
    record.save(tmp_path / "e.json")
    assert EvaluationRecord.load(tmp_path / "e.json") == record
    assert len(evaluation_tables(record)) == 2


def test_text_that_was_calibrated_on_is_refused(calibration) -> None:
    with pytest.raises(CorpusError, match="calibration text"):
        evaluated(calibration, calibration.sequences)
