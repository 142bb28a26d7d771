"""`eigencache adapter` as its user calls it, in a process of its own."""

from pathlib import Path

import pytest

from cli_process import error_of, run, shown
from eigencache.records.adapter import AdapterRecord

pytestmark = pytest.mark.slow

FEW = ("--tokens", "1024", "--max-length", "128", "--calibration-tokens", "4096", "--steps", "2")


@pytest.mark.parametrize(("target", "loss", "protocol"), [("v", "nll+tail", ()), ("k", "nll@rank", ("--chunk", "64"))])
def test_it_prints_both_tables_and_writes_json_and_plot(
    target: str, loss: str, protocol: tuple[str, ...], tmp_path: Path
) -> None:
    options = (
        "--target",
        target,
        "--loss",
        loss,
        "--layers",
        "2,5",
        "--ranks",
        "32,full",
        "-o",
        "a.json",
        "--plot",
        "a.png",
    )
    text = shown(run("adapter", "ref-llama", *options, *protocol, *FEW, folder=tmp_path))
    record = AdapterRecord.load(tmp_path / "a.json")
    assert (record.target, record.training.loss, record.training.loss_rank) == (target, loss, 32)
    assert record.protocol.kind == ("chunked" if protocol else "prefix")
    assert [o.layer_idx for o in record.operators] == [2, 5]
    assert all(abs(o.energy[32] - 0.5) < 0.01 for o in record.operators)  # 32 of 64, near the identity
    assert abs(record.of("operator-svd")[1].quality.delta_nll) < 1e-3
    assert "M = I + s·W_out W_in" in text
    assert "cached as r coefficients per layer" in text
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("ref-llama", "--ranks", "eight"), "--ranks eight: give numbers"),
        (("ref-llama", "--layers", "two"), "--layers two: give numbers"),
        (("ref-llama", "--learning-rate", "-1", *FEW), "--learning-rate -1: must be above 0"),
        (("ref-deepseek", *FEW), "layer 0 caches an MLA latent and not values"),
        (("ref-llama", "--prefix", "64", "--chunk", "8"), "--prefix and --chunk"),
        (("ref-llama", "-o", "/dev/null/a.json"), "cannot be written"),
    ],
)
def test_a_mistake_is_one_line(arguments: tuple[str, ...], words: str, tmp_path: Path) -> None:
    assert words in error_of(run("adapter", *arguments, folder=tmp_path))
    assert not list(tmp_path.iterdir())


def test_help_has_examples(tmp_path: Path) -> None:
    text = shown(run("adapter", "--help", folder=tmp_path))
    assert "Examples" in text
    assert "eigencache adapter ref-llama --loss nll@rank" in text
