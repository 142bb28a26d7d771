"""`eigencache recommend` as its user calls it: advice from a model, a probe and a sweep; mistakes end in one line."""

import shlex
from pathlib import Path

import pytest

from cli_process import error_of, run, shown
from eigencache.codec.saved.folder import load_codec
from eigencache.records.advice import Advice
from eigencache.records.probe import ProbeRecord
from planted_sweeps import series, sweep

pytestmark = pytest.mark.slow

FEW = ("--tokens", 2048, "--max-length", 128, "--calibration-tokens", 4096, "--prefix", 96)


@pytest.fixture
def swept(tmp_path: Path) -> Path:
    record = sweep(series("v", (8, 1.8, 0.004, 0.002)), series("kv", (12, 6.0, 0.003, 0.004)))
    record.save(tmp_path / "sweep.json")
    return tmp_path


def test_a_probe_of_a_model_leads_to_measured_advice_and_leaves_no_partial_file(tmp_path: Path) -> None:
    probed = ("probe", "ref-llama", "--tokens", 8192, "--max-length", 256, "--scope", "layer", "-o", "probe.json")
    shown(run(*probed, folder=tmp_path))
    low_rank = (*FEW, "--families", "pca")
    found = run("recommend", "probe.json", *low_rank, "--budget-nll", 0.5, "-o", "advice.json", folder=tmp_path)
    said = shown(found)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["advice.json", "probe.json"]
    advice = Advice.load(tmp_path / "advice.json")
    assert advice.subject == "probe.json"
    assert advice.chosen
    assert advice.chosen.describe() in said
    assert "on held-out sequences that the choice did not use" in said
    assert all(line in said for line in advice.unknown)
    assert "probe: values" in said
    assert "written: advice.json" in said
    shown(run(*shlex.split(advice.chosen.command)[1:], folder=tmp_path))
    assert load_codec(tmp_path / "ref-llama-pca").codec.nbytes == advice.chosen.choosing.basis_nbytes
    record = ProbeRecord.load(tmp_path / "probe.json")
    record.model.sha256 = "0" * 64
    record.save(tmp_path / "probe.json")
    assert "probe the model again" in error_of(run("recommend", "probe.json", *low_rank, folder=tmp_path))


def test_a_sweep_is_advised_from_as_it_is(swept: Path) -> None:
    said = shown(run("recommend", "sweep.json", "-o", "advice.json", folder=swept))
    assert "compress K before rotation and V, one basis per head, metric fisher, rank 12 of 32 in 8 bits" in said
    assert "(budget --budget-ppl 1%, 0.00995 nats per token)" in said
    assert "not measured: K\n" in said
    none = shown(run("recommend", "sweep.json", "--budget-nll", 0, folder=swept))
    assert "no measured setting meets the budget (--budget-nll 0" in none


def test_the_commands_of_a_recommendation_make_the_codecs_that_it_states(tmp_path: Path) -> None:
    few = ("--tokens", 2560, "--max-length", 160, "--calibration-tokens", 4096, "--prefix", 128, "--budget-nll", 0.5)
    said = shown(run("recommend", "ref-llama", *few, "--families", "eigen,live", "-o", "advice.json", folder=tmp_path))
    assert "one recommendation for each use" in said
    advice = Advice.load(tmp_path / "advice.json")
    stored, live = (one.chosen for one in advice.codecs)
    assert stored and live and not advice.sweeps
    assert [path.name for path in tmp_path.iterdir()] == ["advice.json"]
    for measured in (stored, live):
        assert f"Command: {measured.command}" in said and measured.stating
        shown(run(*shlex.split(measured.command)[1:], folder=tmp_path))
    saved = load_codec(tmp_path / "ref-llama-eigen")
    assert saved.card.expected.bits_per_value == pytest.approx(stored.rate, rel=0.01)
    assert saved.codec.nbytes == pytest.approx(stored.longer.basis_nbytes, rel=0.1)  # another step within the tolerance
    attended = load_codec(tmp_path / "ref-llama-live").codec
    assert (attended.nbytes_of(2048), attended.nbytes) == (live.longer.payload_nbytes, live.longer.basis_nbytes)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--budget-nll", "0.01", "--budget-ppl", "1%"), "--budget-nll and --budget-ppl both set the loss budget"),
        (("--budget-ppl", "much"), "--budget-ppl much: give a perplexity increase"),
        (("--budget-nll=-1",), "--budget-nll -1: a budget must not be negative"),
        (("--families", "live"), "--families: sweep.json is a sweep, so nothing is measured"),
        (("--tokens", "4096"), "--tokens: sweep.json is a sweep, so nothing is measured"),
    ],
)
def test_what_cannot_be_asked_is_one_line(arguments: tuple[str, ...], says: str, swept: Path) -> None:
    assert says in error_of(run("recommend", "sweep.json", *arguments, folder=swept))


def test_wrong_files_and_too_little_text_are_one_line(swept: Path) -> None:
    (swept / "other.json").write_text('{"schema_version": "eigencache.score/1"}')
    assert "is a record of type eigencache.score/1" in error_of(run("recommend", "other.json", folder=swept))
    assert "absent.json: cannot be read" in error_of(run("recommend", "absent.json", folder=swept))
    assert "--families kvtc: no such family. Choose from pca, eigen, live." in error_of(
        run("recommend", "ref-llama", "--families", "eigen,kvtc", folder=swept)
    )
    short = ("--tokens", 1024, "--max-length", 128, "--calibration-tokens", 1024)
    assert "16 are needed" in error_of(run("recommend", "ref-llama", *short, folder=swept))


def test_help_has_examples(tmp_path: Path) -> None:
    assert "eigencache recommend report/report.json --model ref-deepseek" in shown(
        run("recommend", "--help", folder=tmp_path)
    )
