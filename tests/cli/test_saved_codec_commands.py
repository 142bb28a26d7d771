"""A codec is saved by one `evaluate` and used by the next, each in a process of its own; what does not fit is one line."""

import copy
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from cli_process import error_of, run, shown
from eigencache.codec.saved.folder import CARD, TENSORS, load_codec
from eigencache.models.sources import bundled_path
from eigencache.records.quality import EvaluationRecord
from tiny_models import tiny

pytestmark = pytest.mark.slow

FEW = ("--tokens", "1024", "--max-length", "128", "--prompts", "0", "--tasks", "none")
FITTING = ("--target", "kv", "--ranks", "24", "--metric", "frobenius", "--bits", "8", "--calibration-tokens", "8192")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the record of an evaluation, `e.json`, and the codec that it saved, `kv24`."""
    folder = tmp_path_factory.mktemp("saved")
    assert "written: kv24" in shown(
        run("evaluate", "ref-llama", *FITTING, *FEW, "-o", "e.json", "--save-codec", "kv24", folder=folder)
    )
    return folder


def test_the_next_evaluation_fits_nothing_and_finds_the_same(saved: Path, tmp_path: Path) -> None:
    result = run("evaluate", "ref-llama", "--codec", saved / "kv24", *FEW, "-o", "e.json", folder=tmp_path)
    before, after = (EvaluationRecord.load(folder / "e.json") for folder in (saved, tmp_path))
    assert "kv · head · pre-RoPE · frobenius · centered · 8 bit · rank 24" in after.ledgers
    assert (after.likelihood, after.ledgers, after.calibration) == (before.likelihood, before.ledgers, before.calibration)
    assert "bytes of one sequence" in shown(result)
    assert "capturing" not in result.stderr
    assert {entry.name for entry in (saved / "kv24").iterdir()} == {CARD, TENSORS}
    assert load_codec(saved / "kv24").card.settings.rank == 24


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ("ref-llama", "--codec", "kv24", *FITTING),
            "--target, --ranks, --metric, --bits, --calibration-tokens cannot be combined with --codec",
        ),
        (
            ("ref-llama", "--codec", "kv24", "--save-codec", "again"),
            "--save-codec cannot be combined with --codec",
        ),
        (
            ("ref-llama", "--codec", "absent"),
            "absent: no such folder: name one that `eigencache fit` or `evaluate --save-codec` wrote",
        ),
        (("ref-llama", "--ranks", "16,24", "--save-codec", "new"), "--save-codec new saves one codec, and --ranks has 2"),
        (
            ("ref-llama", "--ranks", "16", "--save-codec", "."),
            ".: would replace the current directory",
        ),
        (("ref-llama", "--save-codec", "e.json/new"), "e.json: is a file: name a folder"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_a_mistake_is_one_line_before_any_work(arguments: tuple[str, ...], words: str, saved: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in saved.rglob("*")}
    result = run("evaluate", *arguments, *FEW, folder=saved)
    assert words in error_of(result)
    assert "tokenizing" not in result.stderr
    assert {path: path.stat().st_mtime_ns for path in saved.rglob("*")} == before


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("ref-qwen2",), "kv24: fitted on ref-llama; this is ref-qwen2, which rotates keys differently (RoPE "),
        (("ref-llama", "--text", "stdlib"), "of the evaluation text's 32-token windows occur in the calibration text"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)  # fmt: skip
def test_a_codec_is_refused_where_it_was_not_fitted_for(arguments: tuple[str, ...], words: str, saved: Path) -> None:
    result = run("evaluate", arguments[0], "--codec", "kv24", *arguments[1:], *FEW, folder=saved)
    assert words in error_of(result)
    assert "likelihood" not in result.stderr


def test_nan_in_calibration_is_located_and_nothing_saved(tmp_path: Path) -> None:
    model = copy.deepcopy(tiny("llama"))
    model.resize_token_embeddings(4096)
    with torch.no_grad():
        model.model.layers[1].self_attn.k_proj.weight[0] = float("nan")
    model.save_pretrained(tmp_path / "broken")
    AutoTokenizer.from_pretrained(bundled_path("ref-llama")).save_pretrained(tmp_path / "broken")
    before = sorted(tmp_path.rglob("*"))
    says = error_of(run("evaluate", "broken", *FEW, "--calibration-tokens", "1024", "--save-codec", "new", folder=tmp_path))
    assert "keys_post_rope: layer 1, head 0 holds NaN or infinite values" in says
    assert sorted(tmp_path.rglob("*")) == before


def test_too_little_calibration_text_is_refused_with_n_eff(tmp_path: Path) -> None:
    options = ("--scope", "all", "--calibration-tokens", "384", "--save-codec", "new")
    says = error_of(run("evaluate", "ref-llama", *FEW, *options, folder=tmp_path))
    assert "independent vectors cannot carry a basis of 448 dimensions. Use more calibration tokens" in says
    assert "all layers: n_eff of " in says
    assert not list(tmp_path.iterdir())
