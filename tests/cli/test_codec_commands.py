"""The commands that compress, as their user calls them, each in a process of its own."""

import subprocess
from pathlib import Path

import pytest

from cli_process import error_of, run, shown
from eigencache.records.quality import EvaluationRecord, SweepRecord

pytestmark = pytest.mark.slow

FEW = ("--tokens", "2048", "--max-length", "128", "--calibration-tokens", "8192")


@pytest.mark.parametrize(("model", "target"), [("ref-qwen2", "k"), ("ref-deepseek", "latent")])
def test_sweep_prints_both_tables_and_writes_json_and_plot(model: str, target: str, tmp_path: Path) -> None:
    options = ("--target", target, "--ranks", "8,full", "--metric", "frobenius", "-o", "s.json", "--plot", "s.png")
    text = shown(run("sweep", model, *options, *FEW, folder=tmp_path))
    record = SweepRecord.load(tmp_path / "s.json")
    assert [point.rank for point in record.series[0].points] == [8, record.series[0].width]
    assert abs(record.series[0].points[-1].quality.delta_nll) < 1e-3
    assert "loss by rank" in text
    assert "largest ratio within a perplexity increase" in text
    assert (tmp_path / "s.png").read_bytes().startswith(b"\x89PNG")
    assert not list(tmp_path.glob("*.partial"))


def test_sweep_without_a_target_covers_the_model(tmp_path: Path) -> None:
    options = ("--ranks", "full", "--metric", "frobenius", "--controls", "-o", "s.json")
    run("sweep", "ref-llama", *options, *FEW, folder=tmp_path)
    names = [series.name for series in SweepRecord.load(tmp_path / "s.json").series]
    assert names == [
        "v · head · frobenius · centered",
        "k · head · pre-RoPE · frobenius · centered",
        "kv · head · pre-RoPE · frobenius · centered",
        "k · head · post-RoPE · frobenius · uncentered",
        "v · head · frobenius · centered · pooled basis",
        "v · head · frobenius · centered · random basis",
    ]


def test_evaluate_prints_every_part(tmp_path: Path) -> None:
    options = (
        "--ranks",
        "16",
        "--metric",
        "frobenius",
        "--prompts",
        "1",
        "--tasks",
        "copy",
        "--lengths",
        "64",
        "-o",
        "e.json",
    )
    text = shown(run("evaluate", "ref-llama", *options, *FEW, folder=tmp_path))
    for heading in (": likelihood", "greedy generation", "retrieval", "bytes of one sequence"):
        assert heading in text
    assert EvaluationRecord.load(tmp_path / "e.json").model.name == "ref-llama"


def test_fold_shows_rounding_beside_the_effect(tmp_path: Path) -> None:
    text = shown(run("fold", "ref-gpt2", "--tokens", "512", "--calibration-tokens", "8192", folder=tmp_path))
    assert "attention on coefficients" in text
    assert "kv, rank 32 of 64" in text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("sweep", "ref-llama", "--ranks", "eight"), "--ranks eight: give numbers"),
        (("sweep", "ref-llama", "--ranks", "0,8"), "0 is no rank; ranks begin at 1"),
        (("sweep", "ref-llama", "--target", "v", "--ranks", "33", *FEW), "--ranks 33: v · head · fisher"),
        (("sweep", "ref-llama", "--target", "latent", *FEW), "ref-llama does not cache latent: it caches keys and values"),
        (("sweep", "ref-llama", "--text", "stdlib", *FEW), "of the evaluation text's 32-token windows occur"),
        (("sweep", "ref-llama", "--prefix", "127", *FEW), "every sequence has fewer than 129 tokens"),
        (("sweep", "ref-llama", "--scope", "all", *FEW[:4], "--calibration-tokens", "384"), "cannot carry a basis"),
        (("evaluate", "ref-llama", "--lengths", "long", *FEW), "--lengths long: give numbers"),
        (("evaluate", "ref-llama", "--tasks", "chess", *FEW), "chess"),
        (("fold", "ref-llama", "--rank", "40", "--calibration-tokens", "8192"), "rank 40 is out of range: v · head"),
        (("sweep", "ref-llama", "-o", "/dev/null/s.json"), "cannot be written"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line(arguments: tuple[str, ...], words: str, tmp_path: Path) -> None:
    result: subprocess.CompletedProcess[str] = run(*arguments, folder=tmp_path)
    assert words in error_of(result)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", ["sweep", "evaluate", "fold", "mla", "recommend"])
def test_help_has_examples(command: str, tmp_path: Path) -> None:
    text = shown(run(command, "--help", folder=tmp_path))
    assert "Examples" in text
    assert f"eigencache {command} ref-" in text
