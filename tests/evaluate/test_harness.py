"""lm-evaluation-harness runs a local task on a bundled model, and its answers come through the cache."""

import json
import math
from pathlib import Path

import pytest
import torch

from eigencache.calibration.calibration_set import CalibrationSet
from eigencache.calibration.session import Session
from eigencache.codec.saved.folder import load_codec, save_codec
from eigencache.corpora.resolve import read_text
from eigencache.corpora.sequences import pack
from eigencache.errors import CodecError, ModelError
from eigencache.fitting.eigen import EigenSettings, fit_eigen
from eigencache.fitting.pca import PCACalibration
from eigencache.fitting.pca_settings import PCASettings
from eigencache.fitting.provenance import eigen_fitting_of, fitting_of
from eigencache.records.fit import Expected
from eigencache.records.provenance import Stopwatch
from stub_codecs import Identity, Zeros, bundled

pytestmark = pytest.mark.slow

lm_eval = pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from eigencache.evaluate.harness import CodecLM  # noqa: E402

ONCE = "def walrus_tusk(meadow, lantern):\n    return meadow.harvest(lantern)\n\n\n"
NAME = ONCE * 3 + "def walrus_"
TEXT = ONCE * 3 + "def walrus_tusk(meadow, lantern):\n"
KNOWN, UNKNOWN = "    return meadow.harvest(lantern)", "    banana.lantern(harvest)"
PAIRS = [(TEXT, KNOWN), (TEXT, UNKNOWN), ("def", " read(path)"), ("", "import os"), ("x = ", "1")]


def model(codec: object = "none", **options: object) -> CodecLM:
    return CodecLM(bundled("ref-llama"), codec, **options)  # type: ignore[arg-type]


def asked(kind: str, *arguments: tuple) -> list[Instance]:
    return [Instance(kind, {}, given, i) for i, given in enumerate(arguments)]  # type: ignore[arg-type]


@torch.no_grad()
def by_hand(context: str, continuation: str) -> tuple[float, bool]:
    """One ordinary pass over context and continuation, which read no cache."""
    loaded = bundled("ref-llama")
    start = loaded.tokenizer.encode(context.rstrip()) or [loaded.tokenizer.bos_token_id]
    whole = loaded.tokenizer.encode(context + continuation)
    ids = torch.tensor([[*start, *(whole[len(start) :] if context else whole)]])
    logits = loaded.model(input_ids=ids, use_cache=False).logits.log_softmax(-1)[0, len(start) - 1 : -1]
    targets = ids[0, len(start) :]
    return float(logits.gather(-1, targets[:, None]).sum()), bool((logits.argmax(-1) == targets).all())


def test_continuations_score_as_in_one_pass_also_after_empty_and_one_token_contexts() -> None:
    plain = model().loglikelihood(asked("loglikelihood", *PAIRS))
    for (found, greedy), pair in zip(plain, PAIRS, strict=True):
        expected, ranked_first = by_hand(*pair)
        assert found == pytest.approx(expected, abs=1e-3) and greedy == ranked_first
    assert plain[0][0] > plain[1][0]
    assert model(Identity()).loglikelihood(asked("loglikelihood", *PAIRS)) == plain
    assert model().loglikelihood(asked("loglikelihood", ("a", ""))) == [(0.0, True)]


def test_zeros_ruin_what_has_a_past_and_nothing_else() -> None:
    plain = model().loglikelihood(asked("loglikelihood", *PAIRS))
    zeros = model(Zeros()).loglikelihood(asked("loglikelihood", *PAIRS))
    assert zeros[0][0] < plain[0][0] - 5
    assert zeros[2:4] == plain[2:4]  # a context of one token leaves nothing to encode
    half = model("16bit").loglikelihood(asked("loglikelihood", *PAIRS))
    assert half[0][0] == pytest.approx(plain[0][0], abs=0.05) and half[0] != plain[0]
    assert model(Zeros(), window=len(TEXT)).loglikelihood(asked("loglikelihood", *PAIRS)) == plain


@torch.no_grad()
def test_a_rolling_text_scores_as_in_one_pass_and_every_token_once() -> None:
    loaded = bundled("ref-llama")
    ids = torch.tensor([[loaded.tokenizer.bos_token_id, *loaded.tokenizer.encode(TEXT)]])
    expected = float(
        loaded.model(input_ids=ids).logits.log_softmax(-1)[0, :-1].gather(-1, ids[0, 1:, None]).sum(),
    )
    request = asked("loglikelihood_rolling", (TEXT,))
    for chunk in (9, 256):
        assert model(chunk=chunk).loglikelihood_rolling(request)[0] == pytest.approx(expected, abs=1e-3)
    assert model(Identity(), chunk=9).loglikelihood_rolling(request) == model(chunk=9).loglikelihood_rolling(request)
    assert model(Zeros(), chunk=9).loglikelihood_rolling(request)[0] < expected - 20
    assert model(Zeros(), chunk=256).loglikelihood_rolling(request)[0] == pytest.approx(expected, abs=1e-3)
    short = model(max_length=16)
    assert short.loglikelihood_rolling(request)[0] < expected
    assert model(max_length=16, chunk=5).loglikelihood_rolling(request)[0] == pytest.approx(
        short.loglikelihood_rolling(request)[0], abs=1e-3
    )
    assert short.loglikelihood_rolling(asked("loglikelihood_rolling", ("",))) == [0]


def test_generation_stops_where_it_is_told_and_reads_the_cache() -> None:
    settings = {"until": ["\n\n"], "max_gen_toks": 12}
    request = asked(
        "generate_until", (NAME, {"until": ["("], "max_gen_toks": 8}), (TEXT, settings), ("", {"max_gen_toks": 3})
    )
    plain = model().generate_until(request)
    assert settings == {"until": ["\n\n"], "max_gen_toks": 12}
    assert plain[0] == "tusk"
    (longer,) = model().generate_until(asked("generate_until", (TEXT, {"until": [], "max_gen_toks": 12})))
    assert plain[1] == longer.split("\n\n")[0] != ""  # the line break that ends the context is no part of a stop
    assert (
        model().generate_until(asked("generate_until", (TEXT, {"until": longer[3:6], "max_gen_toks": 12})))[0] == longer[:3]
    )
    assert model(Identity()).generate_until(request) == plain
    assert model(Zeros()).generate_until(request)[0] != plain[0]


def test_a_context_that_is_too_long_loses_its_start() -> None:
    short = model(max_length=16)
    tail = bundled("ref-llama").tokenizer.decode(bundled("ref-llama").tokenizer.encode(TEXT)[-24:])
    pairs = [(TEXT, KNOWN), (tail, KNOWN)]
    far, near = short.loglikelihood(asked("loglikelihood", *pairs))
    assert far == near != model().loglikelihood(asked("loglikelihood", pairs[0]))[0]
    settings = {"until": [], "max_gen_toks": 4}
    far, near = short.generate_until(asked("generate_until", (TEXT, settings), (tail, settings)))
    assert far == near


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A codec of ref-llama that keeps half of every head's directions, in a folder."""
    calibration = PCACalibration(
        Session(bundled("ref-llama")), pack(read_text("stdlib"), bundled("ref-llama").tokenizer, tokens=4096, max_length=128)
    )
    codec = calibration.fit(PCASettings("kv")).truncated(16)
    folder = tmp_path_factory.mktemp("saved") / "codec"
    save_codec(folder, codec, *fitting_of(codec, PCASettings("kv"), calibration))
    return folder


def test_a_saved_codec_is_read_from_its_folder(saved: Path) -> None:
    plain, low, again = (
        model(codec).loglikelihood(asked("loglikelihood", *PAIRS)) for codec in ("none", str(saved), load_codec(saved).codec)
    )
    assert low == again
    assert low[0][0] < plain[0][0] - 0.01
    assert low[2:4] == plain[2:4]


def test_a_saved_eigen_codec_is_read_from_its_folder(tmp_path: Path) -> None:
    loaded, chosen, watch = bundled("ref-llama"), EigenSettings(metric="frobenius"), Stopwatch()
    text = pack(read_text("stdlib"), loaded.tokenizer, tokens=4096, max_length=128)
    point = fit_eigen(CalibrationSet(Session(loaded), text), chosen).at_step(2.0)
    expected = Expected(
        context=128,
        bits_per_value=1,
        coded_bits=point.coded_bits,
        tokens=1,
        delta_nll=0,
        delta_nll_interval=None,
        kl=0,
        top1_agreement=1,
    )
    save_codec(tmp_path / "codec", point.codec, *eigen_fitting_of(chosen, expected, loaded, text, watch.run(0, {})))
    given = ("none", str(tmp_path / "codec"), point.codec)
    plain, low, again = (model(one).loglikelihood(asked("loglikelihood", *PAIRS)) for one in given)
    assert low == again
    assert low[0][0] != plain[0][0]
    assert low[2:4] == plain[2:4]  # contexts of one token: nothing is encoded


def test_a_saved_codec_of_another_model_is_refused(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(CodecError, match=f"{saved}: fitted on ref-llama; this is .*, which rotates keys differently"):
        CodecLM(bundled("ref-qwen2"), str(saved))
    with pytest.raises(CodecError, match=r"holds no codec"):
        model(str(tmp_path))


def test_bad_arguments_are_refused_in_one_line() -> None:
    with pytest.raises(CodecError, match=r"`codec` zip: no such codec\. Use none or 16bit, a folder written by"):
        model("zip")
    with pytest.raises(CodecError, match="`codec` 24: no such codec"):
        model(24)
    with pytest.raises(ModelError, match=r"`batch_size` 8.*: an encoded cache does not support padding"):
        model(batch_size=8)
    with pytest.raises(ModelError, match="`max_length` 1: ref-llama accepts 2"):
        model(max_length=1)
    with pytest.raises(ModelError, match="`chunk` 0"):
        model(chunk=0)
    with pytest.raises(ModelError, match="`max_gen_toks` 40 leaves no room"):
        model(max_length=40).generate_until(asked("generate_until", (TEXT, {"max_gen_toks": 40})))
    with pytest.raises(ModelError, match=r"continuation of .* tokens is longer than `max_length` 4"):
        model(max_length=4).loglikelihood(asked("loglikelihood", ("a", TEXT)))


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TaskManager:
    """Three local tasks of two lines each, one per kind of request."""
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    lines = [
        {"text": NAME, "choices": ["tusk", "lantern"], "answer": 0},
        {"text": TEXT + "    return meadow.", "choices": ["tusk", "harvest"], "answer": 1},
    ]
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(map(json.dumps, lines)))
    common = f"""
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}, cache_dir: {tmp_path / "cache"}}}
test_split: test
"""
    kinds = {
        "local_choice": 'output_type: multiple_choice\ndoc_to_text: "{{text}}"\ndoc_to_choice: choices\n'
        'doc_to_target: answer\ntarget_delimiter: ""\nmetric_list: [{metric: acc}]',
        "local_rolling": 'output_type: loglikelihood_rolling\ndoc_to_text: ""\ndoc_to_target: "{{text}}"\n'
        "metric_list: [{metric: byte_perplexity}]",
        "local_generation": 'output_type: generate_until\ndoc_to_text: "{{text}}"\n'
        'doc_to_target: "{{choices[answer]}}"\ngeneration_kwargs: {until: ["("], max_gen_toks: 8}\n'
        "metric_list: [{metric: exact_match}]",
    }
    for name, text in kinds.items():
        (tmp_path / f"{name}.yaml").write_text(f"task: {name}{common}{text}\n")
    return TaskManager(include_path=str(tmp_path), include_defaults=False)


def test_local_tasks_of_every_kind_run_with_and_without_a_codec(tasks: TaskManager, saved: Path) -> None:
    def run(lm: object, **options: object) -> dict:
        names = ["local_choice", "local_rolling", "local_generation"]
        found = lm_eval.simple_evaluate(lm, tasks=names, task_manager=tasks, bootstrap_iters=0, **options)  # type: ignore[arg-type]
        return {name: next(v for k, v in found["results"][name].items() if k.endswith(",none")) for name in names}

    named = run("eigencache", model_args="pretrained=ref-llama,codec=16bit,chunk=8", device="cpu")
    low = run("eigencache", model_args=f"pretrained=ref-llama,codec={saved},chunk=8", device="cpu")
    plain, zeros = (run(model(codec, chunk=8)) for codec in ("none", Zeros()))
    assert plain["local_rolling"] < low["local_rolling"] < zeros["local_rolling"]
    assert plain["local_choice"] == named["local_choice"] == 1.0
    assert plain["local_generation"] == named["local_generation"] == 1.0 > zeros["local_generation"]
    assert named["local_rolling"] == pytest.approx(plain["local_rolling"], rel=1e-2)
    assert named["local_rolling"] != plain["local_rolling"]
    assert 1.2 * plain["local_rolling"] < zeros["local_rolling"] < math.inf
