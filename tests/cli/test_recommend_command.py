"""`eigencache recommend` as its user calls it: advice from a model, a probe and a sweep; mistakes end in one line."""

from pathlib import Path

import pytest

from cli_process import error_of, run, shown
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
    found = run("recommend", "probe.json", *FEW, "--budget-nll", 0.5, "-o", "advice.json", folder=tmp_path)
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
    record = ProbeRecord.load(tmp_path / "probe.json")
    record.model.sha256 = "0" * 64
    record.save(tmp_path / "probe.json")
    assert "probe the model again" in error_of(run("recommend", "probe.json", *FEW, folder=tmp_path))


def test_a_sweep_is_advised_from_as_it_is(swept: Path) -> None:
    said = shown(run("recommend", "sweep.json", "-o", "advice.json", folder=swept))
    assert "compress K before rotation and V, one basis per head, metric fisher, rank 12 of 32 in 8 bits" in said
    assert "(budget --budget-ppl 1%, 0.00995 nats per token)" in said
    assert "not measured: K\n" in said
    none = shown(run("recommend", "sweep.json", "--budget-nll", 0, folder=swept))
    assert "no measured setting meets the budget (--budget-nll 0" in none


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--budget-nll", "0.01", "--budget-ppl", "1%"), "--budget-nll and --budget-ppl both set the loss budget"),
        (("--budget-ppl", "much"), "--budget-ppl much: give a perplexity increase"),
        (("--budget-nll=-1",), "--budget-nll -1: a budget must not be negative"),
        (("--tokens", "4096"), "--tokens: sweep.json is a sweep, so nothing is measured"),
    ],
)
def test_what_cannot_be_asked_is_one_line(arguments: tuple[str, ...], says: str, swept: Path) -> None:
    assert says in error_of(run("recommend", "sweep.json", *arguments, folder=swept))


def test_wrong_files_and_too_little_text_are_one_line(swept: Path) -> None:
    (swept / "other.json").write_text('{"schema_version": "eigencache.score/1"}')
    assert "is a record of type eigencache.score/1" in error_of(run("recommend", "other.json", folder=swept))
    assert "absent.json: cannot be read" in error_of(run("recommend", "absent.json", folder=swept))
    short = ("--tokens", 1024, "--max-length", 128, "--calibration-tokens", 1024)
    assert "16 are needed" in error_of(run("recommend", "ref-llama", *short, folder=swept))


def test_help_has_examples(tmp_path: Path) -> None:
    assert "eigencache recommend report/report.json --model ref-deepseek" in shown(
        run("recommend", "--help", folder=tmp_path)
    )
