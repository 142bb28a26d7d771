"""A saved codec is evaluated as the fitted one was, remembers its calibration text, and knows it again."""

from pathlib import Path

import pytest

from eigencache.calibration.session import Session
from eigencache.codec.saved.folder import SavedCodec, load_codec, save_codec
from eigencache.corpora.resolve import read_text
from eigencache.corpora.sequences import pack
from eigencache.errors import CorpusError
from eigencache.fitting.pca import PCACalibration
from eigencache.fitting.pca_settings import PCASettings
from eigencache.fitting.provenance import fitting_of
from eigencache.records.quality import EvaluationRecord, ReadingProtocol
from eigencache.studies.evaluation import evaluate_codecs
from eigencache.studies.sweep import Plan, codecs_of
from stub_codecs import bundled

pytestmark = pytest.mark.slow

PROTOCOLS = (ReadingProtocol(kind="prefix", length=48),)


@pytest.fixture(scope="module")
def calibration() -> PCACalibration:
    loaded = bundled("ref-llama")
    return PCACalibration(Session(loaded), pack(read_text("stdlib"), loaded.tokenizer, tokens=8192, max_length=256))


@pytest.fixture(scope="module")
def saved(calibration: PCACalibration, tmp_path_factory: pytest.TempPathFactory) -> SavedCodec:
    plan = Plan(PCASettings("kv", metric="fisher"), 8, (12,))
    (codec,) = codecs_of(calibration, plan).values()
    folder = tmp_path_factory.mktemp("saved") / "codec"
    save_codec(folder, codec, *fitting_of(codec, plan.settings, calibration))
    return load_codec(folder)


def evaluated(source: PCACalibration | SavedCodec, codec, text, **options) -> EvaluationRecord:
    return evaluate_codecs(
        Session(bundled("ref-llama"), batch_size=4),
        text,
        source,
        {codec.name: codec},
        PROTOCOLS,
        prompts=0,
        tasks=(),
        **options,
    )


@pytest.fixture(scope="module")
def text():
    return pack(read_text("stdlib:held-out"), bundled("ref-llama").tokenizer, tokens=96 * 9, max_length=96)


def test_a_saved_codec_scores_as_the_fitted_one(
    calibration: PCACalibration, saved: SavedCodec, text, tmp_path: Path
) -> None:
    (fitted,) = codecs_of(calibration, Plan(PCASettings("kv", metric="fisher"), 8, (12,))).values()
    before, after = evaluated(calibration, fitted, text), evaluated(saved, saved.codec, text)
    for part in ("model", "corpus", "calibration", "likelihood", "ledgers", "warnings"):
        assert getattr(before, part) == getattr(after, part), part
    assert (before.run.settings["codec_sha256"], after.run.settings["codec_sha256"]) == (None, saved.card.tensors_sha256)
    after.save(tmp_path / "e.json")
    assert EvaluationRecord.load(tmp_path / "e.json") == after


def test_the_card_says_how_the_codec_came_about(calibration: PCACalibration, saved: SavedCodec) -> None:
    origin, settings = saved.card.origin, saved.card.settings
    assert (origin.model, origin.dtype, origin.calibration) == ("ref-llama", "float32", calibration.sequences.corpus)
    assert (settings.target, settings.scope, settings.metric, settings.bits, settings.rank) == (
        "kv",
        "head",
        "fisher",
        8,
        12,
    )
    assert origin.run.seed == calibration.session.seed
    assert 0 < origin.run.forward_s < origin.run.wall_s


def test_text_that_a_saved_codec_was_fitted_on_is_refused_unless_forced_and_then_marked(
    calibration: PCACalibration, saved: SavedCodec
) -> None:
    text = pack(read_text("stdlib"), bundled("ref-llama").tokenizer, tokens=96 * 9, max_length=96)
    with pytest.raises(CorpusError, match=r"of the evaluation text's 32-token windows occur in the calibration text"):
        evaluated(saved, saved.codec, text)
    assert any(warning.startswith("OVERLAP: ") for warning in evaluated(saved, saved.codec, text, force=True).warnings)
