"""A fitted `eigen` codec is saved with its promise, belongs to its model alone, and is evaluated as the fitted one."""

import copy
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch

from eigencache.calibration.calibration_set import CalibrationSet
from eigencache.calibration.session import Session
from eigencache.codec.eigen.codec import EigenCodec
from eigencache.codec.saved.eigen import EigenCard
from eigencache.codec.saved.folder import SavedCodec, load_codec, save_codec
from eigencache.corpora.overlap import sketch
from eigencache.errors import CodecError, CorpusError
from eigencache.evaluate.prefix import read_prefix
from eigencache.fitting.eigen import EigenSettings, Point, fit_eigen
from eigencache.fitting.provenance import eigen_fitting_of
from eigencache.models.codec_check import check_belongs, codec_for
from eigencache.records.fit import Expected
from eigencache.records.provenance import Stopwatch
from eigencache.records.quality import EvaluationRecord, ReadingProtocol
from eigencache.studies.evaluation import evaluate_codecs
from stub_codecs import random_sequences, tiny_loaded
from tiny_models import tiny, token_ids

CONTEXT = 256
SETTINGS = EigenSettings(metric="frobenius", block=16)
PROTOCOL = ReadingProtocol(kind="chunked", length=24)


def fitted(name: str, folder: Path) -> tuple[Point, SavedCodec]:
    loaded, sequences, watch = tiny_loaded(name), random_sequences(*(64,) * 24), Stopwatch()
    fit = fit_eigen(CalibrationSet(Session(loaded), sequences), SETTINGS)
    point = fit.at_step(0.2)
    expected = Expected(
        context=CONTEXT,
        bits_per_value=fit.bits_per_value(point, CONTEXT),
        coded_bits=point.coded_bits,
        tokens=100,
        delta_nll=0.01,
        delta_nll_interval=None,
        kl=0.01,
        top1_agreement=0.9,
    )
    fitting = eigen_fitting_of(SETTINGS, expected, loaded, sequences, watch.run(0, {"step": point.codec.step}))
    save_codec(folder, point.codec, *fitting)
    return point, load_codec(folder)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Point, SavedCodec]:
    return fitted("llama", tmp_path_factory.mktemp("llama") / "codec")


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma3_text", "deepseek_v2"])  # no RoPE, RoPE, sliding windows, MLA
def test_what_is_loaded_writes_the_same_containers_and_belongs(name: str, tmp_path: Path) -> None:
    point, saved = fitted(name, tmp_path / "codec")
    codec = codec_for(saved, tiny_loaded(name))
    with torch.no_grad():
        cached = read_prefix(tiny_loaded(name), token_ids()).stored
    encoded = point.codec.encode(cached)
    assert codec.encode(cached, 0).rows == encoded.rows
    decoded = codec.decode(encoded)  # type: ignore[arg-type]
    assert all(
        torch.equal(a, b) for i, pair in point.codec.decode(encoded).items() for a, b in zip(pair, decoded[i], strict=True)
    )


def test_other_weights_are_refused(llama: tuple[Point, SavedCodec]) -> None:
    loaded = tiny_loaded("llama")
    model = copy.deepcopy(tiny("llama"))
    with torch.no_grad():
        model.model.layers[1].self_attn.v_proj.weight[0, 0] += 1
    with pytest.raises(CodecError, match="other weights or another configuration: load the model it was fitted on"):
        check_belongs(llama[1], type(loaded)("other", model, None, loaded.geometry))  # type: ignore[arg-type]


def test_the_card_says_how_the_codec_came_about(llama: tuple[Point, SavedCodec]) -> None:
    point, saved = llama
    text = random_sequences(*(64,) * 24)
    assert isinstance(saved.card, EigenCard)
    assert saved.card.settings.model_dump() == asdict(SETTINGS)
    assert saved.card.kept.sinks == point.codec.kept.sinks
    assert (saved.card.origin.model, saved.card.origin.calibration) == ("llama", text.corpus)
    assert saved.card.origin.run.settings == {"step": 0.2}
    assert (saved.windows == sketch(text.ids)).all()
    assert saved.coded_bits == saved.card.expected.coded_bits == point.coded_bits


def evaluated(saved: SavedCodec, codec: EigenCodec, seed: int = 1) -> EvaluationRecord:
    text = random_sequences(*(64,) * 9, seed=seed)
    return evaluate_codecs(Session(tiny_loaded("llama")), text, saved, {codec.name: codec}, [PROTOCOL], prompts=0, tasks=())


def test_it_is_evaluated_as_the_fitted_one_and_its_ledger_is_what_its_card_expects(
    llama: tuple[Point, SavedCodec],
) -> None:
    point, saved = llama
    before, after = evaluated(saved, point.codec), evaluated(saved, codec_for(saved, tiny_loaded("llama")))  # type: ignore[arg-type]
    for part in ("model", "calibration", "likelihood", "ledgers", "warnings"):
        assert getattr(before, part) == getattr(after, part), part
    (rows,) = after.ledgers.values()
    assert [row.payload_nbytes for row in rows] == [
        int(np.ceil(point.codec.nbytes_of(row.context, point.coded_bits))) for row in rows
    ]
    assert {row.basis_nbytes for row in rows} == {point.codec.nbytes}


def test_text_that_it_was_fitted_on_is_refused(llama: tuple[Point, SavedCodec]) -> None:
    with pytest.raises(CorpusError, match=r"of the evaluation text's 32-token windows occur in the calibration text"):
        evaluated(llama[1], llama[0].codec, seed=0)
