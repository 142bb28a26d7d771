"""An evaluation looks at a codec from every side, goes on where it stopped, and prints what it found."""

from dataclasses import replace
from pathlib import Path

import pytest

from eigencache import api
from eigencache.calibration.session import Session
from eigencache.codec.saved.folder import load_codec
from eigencache.corpora.resolve import read_text
from eigencache.corpora.sequences import pack
from eigencache.errors import CorpusError, ModelError, StatisticsError, TokenizerMismatchError
from eigencache.fitting.pca import PCACalibration
from eigencache.fitting.pca_settings import PCASettings
from eigencache.records.quality import EvaluationRecord, ReadingProtocol
from eigencache.report.quality.evaluation import evaluation_tables
from eigencache.studies.evaluation import check_evaluation, evaluate_codecs
from stub_codecs import bundled, random_sequences, tiny_loaded

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


NONE = {"prompts": 0, "tasks": ()}


@pytest.mark.parametrize(
    ("model", "lengths", "options", "error", "says"),
    [
        ("llama", (32,), NONE, CorpusError, "every sequence has fewer than 50 tokens"),
        ("gpt2", (65,), NONE, ModelError, "64 positions, but 65 tokens"),
        ("llama", (96,) * 3, {"prompts": 8, "tasks": ()}, CorpusError, "has only 3 prompts of 96 tokens"),
        ("gpt2", (64,) * 8, {"prompts": 8, "tasks": ()}, ModelError, "64 positions, but 128 tokens"),
        ("ref-gpt2", (96,), {"prompts": 0, "lengths": (64, 100_000)}, ModelError, "ref-gpt2 has 2048 positions"),
        ("ref-llama", (96,), {"prompts": 0, "lengths": (4,)}, CorpusError, "`lengths` 4: too short for the task copy"),
    ],
)
def test_what_cannot_be_evaluated_is_found_before_anything_is_fitted(model, lengths, options, error, says) -> None:
    loaded = bundled(model) if model.startswith("ref-") else tiny_loaded(model)
    with pytest.raises(error, match=says):
        check_evaluation(Session(loaded), random_sequences(*lengths), PROTOCOLS, **options)


class Bytes:
    """A tokenizer without words."""

    all_special_ids: tuple[int, ...] = ()

    def __len__(self) -> int:
        return 256

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
        return [f"<{i}>" for i in ids]


def test_a_tokenizer_without_words_and_too_little_memory_are_found_before_anything_is_fitted() -> None:
    llama, text = bundled("ref-llama"), random_sequences(96)
    bytewise = replace(llama, tokenizer=Bytes())
    check_evaluation(Session(bytewise), text, PROTOCOLS, **NONE)
    with pytest.raises(TokenizerMismatchError, match=r"0 tokens that are whole words.* Set `tasks` to none"):
        check_evaluation(Session(bytewise), text, PROTOCOLS, prompts=0)
    with pytest.raises(StatisticsError, match="more than a `memory`"):
        check_evaluation(Session(llama, memory=2**10), text, PROTOCOLS, **NONE)
    check_evaluation(Session(llama), random_sequences(*(256,) * 8), PROTOCOLS)


def test_evaluate_reads_nothing_but_the_text_that_is_too_short() -> None:
    said: list[str] = []
    with pytest.raises(CorpusError, match=r"`prompts` 8: .* has only 4 prompts of 256 tokens"):
        api.evaluate("ref-llama", tokens=1024, on_progress=lambda what, *_: said.append(what))
    assert set(said) == {"tokenizing stdlib:held-out"}


def test_paths_may_be_strings(tmp_path: Path) -> None:
    few = {"tokens": 512, "max_length": 64, "calibration_tokens": 2048, "ranks": (8,)}
    few["settings"] = PCASettings(metric="frobenius")
    partial = str(tmp_path / "partial")
    record = api.evaluate("ref-llama", **few, **NONE, save_to=str(tmp_path / "codec"), partial=partial)
    assert load_codec(tmp_path / "codec").codec.name in record.ledgers
    assert Path(partial).read_text().count("protocol") > 1
    api.sweep("ref-llama", **few, targets=("v",), partial=partial)
    assert "losses" in Path(partial).read_text()
