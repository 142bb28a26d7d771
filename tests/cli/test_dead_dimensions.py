"""A Gemma 3 with dead dimensions through the command line: named by `probe` and `compare`, harmless to codecs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import cli_process
from cli_process import shown
from dead_gemma import CONSTANTS, DEAD_KEYS, PAIR, dead_gemma
from eigencache.api import Probe
from eigencache.models.load import load_tokenizer
from eigencache.records.bench import BenchRecord

pytestmark = pytest.mark.slow

FEW = ("--tokens", 8192, "--max-length", 128)
LAYERS = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with the model `dead`, and its probe in `dead.json`."""
    folder, tokenizer = tmp_path_factory.mktemp("dead"), load_tokenizer("ref-llama")
    for one in (dead_gemma(vocab_size=len(tokenizer), max_position_embeddings=512), tokenizer):
        one.save_pretrained(folder / "dead")
    shown(cli_process.run("probe", "dead", *FEW, "-o", "dead.json", folder=folder))
    return folder


def test_probe_counts_and_names_them_in_every_frame(folder: Path) -> None:
    record = Probe.load(folder / "dead.json").record
    places = {
        "keys_pre_rope": [head * 16 + i for head in (0, 1) for i in DEAD_KEYS],
        "keys_post_rope": [head * 16 + i for head in (0, 1) for i in PAIR],
        "values": sorted(CONSTANTS),
    }
    for name, dead in places.items():
        for layer_idx in range(LAYERS):
            (whole,) = record.select(name, "layer", layer_idx)
            assert whole.dead == dead and 1 < whole.spread < 1e4 and whole.spread_p95_p5 < whole.spread
            heads = [s.dead for s in record.select(name, "head", layer_idx)]
            assert [i + 16 * head for head, found in enumerate(heads) for i in found] == dead
            (about_zero,) = record.select(name, "layer", layer_idx, centered=False)
            assert about_zero.dead == [i for i in dead if name != "values" or not CONSTANTS[i]]
    frame = Probe(Probe.load(folder / "dead.json").record).to_pandas()
    assert set(frame[(frame["scope"] == "layer") & frame["centered"]]["dead"]) == {6, 4, 2}


@pytest.mark.parametrize("view", ["honest", "spread"])
def test_probe_says_how_many_there_are_and_where(folder: Path, view: str) -> None:
    text = shown(cli_process.run("probe", "dead", *FEW, "--view", view, "--layers-table", folder=folder))
    assert "∞" not in text and not re.search(r"\binf\b", text.lower())
    sentence = (
        "keys_pre_rope: 24 dead dimensions in 4 of 4 layers (they never vary, and spreads leave them out): 6 in layers 0–3"
    )
    assert sentence in " ".join(text.split())
    if view == "honest":
        assert "Dead dimensions never vary and are not in Spread: layers 0–3." in text
        assert re.search(r"6 dead.*4 dead.*2 dead", text, re.DOTALL)


def test_compare_and_report_name_them(folder: Path) -> None:
    assert "24 dead dimensions in 4 of 4 layers of keys_pre_rope" in " ".join(
        shown(cli_process.run("compare", "dead.json", folder=folder)).split()
    )
    options = (*FEW, "--held-out", "none", "-o", "report")
    shown(cli_process.run("report", "dead", *options, folder=folder))
    page = (folder / "report" / "report.html").read_text()
    assert "keys_post_rope: 16 dead dimensions in 4 of 4 layers" in page
    assert "keys_post_rope dead</th>" in page and "Dead dim.</th>" in page


def test_a_model_without_them_says_nothing(tmp_path: Path) -> None:
    text = shown(cli_process.run("probe", "ref-gpt2", *FEW, "--layers-table", "-o", "a.json", folder=tmp_path))
    assert "dead" not in text.lower()
    assert all(spectrum.dead == [] for spectrum in Probe.load(tmp_path / "a.json").record.spectra)


def test_codecs_are_fitted_and_evaluated_with_a_small_loss(folder: Path) -> None:
    methods = "eigen,live,pca_head,int,kivi-no-window,kvtc-no-window"
    few = ("--lengths", 128, "--scored", 32, "--tokens", 1024, "--calibration-tokens", 8192, "--seeds", 1)
    shown(cli_process.run("bench", "dead", *few, "--points", 4, "--methods", methods, "-o", "bench", folder=folder))
    record = BenchRecord.load(folder / "bench" / "dead.json")
    least = {}
    for point in record.points:
        least[point.method] = min(least.get(point.method, 1.0), point.quality.kl)
    assert set(least) == set(methods.split(",")) and all(kl < 0.05 for kl in least.values()), least


def test_a_fitted_codec_is_saved_and_used(folder: Path) -> None:
    few = ("--tokens", 8192, "--max-length", 256)
    shown(cli_process.run("fit", "dead", *few, "--bits", 4, "--live", "--live-bits", 4, "-o", "codec", folder=folder))
    text = shown(cli_process.run("evaluate", "dead", "--codec", "codec", "--tokens", 1024, "--prompts", 0, folder=folder))
    assert not re.search(r"\b(nan|inf)\b", text.lower())
