"""Every command as its user calls it, in a process of its own, on the bundled models."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import cli_process
from cli_process import shown as shown_by
from eigencache.cli.app import main
from eigencache.models.load import load_tokenizer
from eigencache.models.sources import BUNDLED
from eigencache.records.advice import ReportRecord
from eigencache.records.probe import ProbeRecord
from eigencache.report.probe.sinks import sinks_table
from tiny_models import GQA, SPARSE_MLA, built

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
FEW = ("--tokens", "8192", "--max-length", "256")


def run(*arguments: object, folder: Path) -> str:
    return shown_by(cli_process.run(*arguments, folder=folder))


def run_script(script: Path, *arguments: object, folder: Path) -> str:
    return shown_by(cli_process.run(*arguments, folder=folder, script=str(script)))


@pytest.mark.parametrize("model", BUNDLED)
def test_probe_prints_a_table_and_writes_json_and_plot(model: str, tmp_path: Path) -> None:
    shown = run("probe", model, *FEW, "--layers-table", "-o", "out.json", "--plot", "out.png", folder=tmp_path)
    record = ProbeRecord.load(tmp_path / "out.json")
    assert record.model.name == model
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
    assert "values" in shown
    assert "written: out.json" in shown
    assert "stdlib:calibration" in record.corpus.name
    assert all(warning.split(":")[0] in shown for warning in record.warnings)


def test_the_view_of_sinks_prints_its_table_and_writes_json_and_plot(tmp_path: Path) -> None:
    shown = run("probe", "ref-qwen2", *FEW, "--view", "sinks", "-o", "out.json", "--plot", "out.png", folder=tmp_path)
    record = ProbeRecord.load(tmp_path / "out.json")
    sinks = record.sinks
    assert sinks is not None and sinks.exact_tokens == 4 and not sinks.reasons
    for row in sinks_table(record).rows:
        assert re.search(r" +".join(map(re.escape, row[:4])), shown)
    assert "attention sinks" in shown and "A fit in the Fisher metric stores the first 4 tokens exactly." in shown
    assert all(0 < slot.gradient_share < 1 for layer in sinks.layers for slot in layer.slots)
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")


def test_a_plain_probe_measures_attention_but_no_gradients(tmp_path: Path) -> None:
    shown = run("probe", "ref-deepseek", *FEW, "-o", "out.json", folder=tmp_path)
    sinks = ProbeRecord.load(tmp_path / "out.json").sinks
    assert sinks is not None and sinks.exact_tokens is None and all(layer.first_share for layer in sinks.layers)
    assert "Attention on the first token: " in shown


def test_compare_puts_records_and_reports_side_by_side(tmp_path: Path) -> None:
    for model in ("ref-gpt2", "ref-llama"):
        run("probe", model, *FEW, "--layers-table", "-o", f"{model}.json", folder=tmp_path)
    files = ("ref-gpt2.json", "ref-llama.json", "-o", "out.md", "--plot", "out.png")
    shown = run("compare", *files, folder=tmp_path)
    table = (tmp_path / "out.md").read_text()
    header = next(line for line in table.splitlines() if line.startswith("| Model"))
    first = [cell.strip() for cell in header.strip("|").split("|")][:6]
    assert first == ["Model", "K energy@32", "V energy@32", "K effective rank", "V effective rank", "Assessment"]
    assert "ref-gpt2" in shown
    assert "ref-llama" in shown
    assert (tmp_path / "out.png").exists()


def test_report_answers_for_every_model_and_writes_one_offline_page_and_its_data(tmp_path: Path) -> None:
    few = ("--tokens", 8192, "--max-length", 256, "--held-out-tokens", 2048)
    shown = run("report", "ref-llama", "ref-deepseek", *few, "-o", "out", folder=tmp_path)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"report.html", "report.json"}
    assert "report.html" in shown
    assert "Summary" in shown
    data = ReportRecord.model_validate_json((tmp_path / "out" / "report.json").read_text())
    assert [probe.model.name for probe in data.probes] == ["ref-llama", "ref-deepseek"]
    assert [verdict.advice.model.name for verdict in data.verdicts] == ["ref-llama", "ref-deepseek"]
    page = (tmp_path / "out" / "report.html").read_text()
    assert not re.search(r'<(?:script|link|img)[^>]+(?:src|href)="?https?:', page)
    assert page.count("Compression ratio and loss</h3>") == page.count("Recommendation</h3>") == 2


def test_report_says_why_a_model_was_not_judged_and_leaves_verdicts_out_when_asked(tmp_path: Path) -> None:
    held_out = ("--text", "stdlib:held-out", *FEW)
    shown = run("report", "ref-llama", *held_out, "-o", "a", folder=tmp_path)
    assert "ref-llama: compression was not measured: " in shown
    assert "occur in the calibration text" in ReportRecord.load(tmp_path / "a" / "report.json").verdicts[0].reason
    shown = run("report", "ref-llama", *held_out, "--held-out", "none", "-o", "b", folder=tmp_path)
    assert "Summary" not in shown
    assert ReportRecord.load(tmp_path / "b" / "report.json").verdicts == []


def test_score_prints_loss_and_copy_accuracy_and_writes_them(tmp_path: Path) -> None:
    shown = run("score", "ref-llama", "--tokens", 4096, "--max-length", 512, "-o", "s.json", folder=tmp_path)
    (score,) = json.loads((tmp_path / "s.json").read_text())
    assert f"{score['loss_nats']:.3f}" in shown
    assert score["corpus"]["name"] == "stdlib:held-out"
    assert 0 < score["copy_accuracy"] <= 1


def test_score_refuses_passes_that_do_not_fit_in_memory(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["score", "ref-llama", "--tokens", "4096", "--memory", "0.01"])
    last = capsys.readouterr().err.splitlines()[-1]
    assert exit_.value.code == 2 and "A pass of 2,048 tokens with 4,096 logits" in last
    assert last.endswith("more than a --memory of 0.01 GiB. Raise --memory or lower --max-length.")


@pytest.mark.parametrize(
    ("script", "options", "files", "says"),
    [
        ("kv_spectrum_probe", ["--output", "F.json", "--plot", "F.png", "--layers", "0,2"], ["F.json", "F.png"], "99"),
        ("analyze_kv_variance", [], ["kv_variance_llama.png"], "K/V"),
        ("analyze_mla_kv_structure", [], ["mla_structure_deepseek_v2.png"], "latent"),
    ],
)
def test_the_historic_entry_points_work(
    script: str, options: list[str], files: list[str], says: str, tmp_path: Path
) -> None:
    """On 131,072 tokens, for which a narrow model is wide enough."""
    model, settings = ("deepseek_v2", SPARSE_MLA) if "mla" in script else ("llama", GQA)
    tokenizer, out = load_tokenizer("ref-llama"), tmp_path / "out"
    narrow = built(model, "AutoModelForCausalLM", settings | {"vocab_size": len(tokenizer), "max_position_embeddings": 512})
    for one in (narrow, tokenizer):
        one.save_pretrained(tmp_path / model)
    out.mkdir()
    shown = run_script(ROOT / "scripts" / f"{script}.py", "--model", tmp_path / model, *options, folder=out)
    assert says in shown
    assert sorted(path.name for path in out.iterdir()) == sorted(files)


def test_help_names_every_command_with_examples(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "eigencache", "--help"]
    overview = subprocess.run(
        command, capture_output=True, text=True, check=True, cwd=tmp_path, env=os.environ | cli_process.ENVIRONMENT
    ).stdout
    assert overview.replace("python -m eigencache", "eigencache").split() == run("--help", folder=tmp_path).split()
    for command in ("report", "probe", "compare", "score"):
        assert command in overview
        assert f"eigencache {command}" in run(command, "--help", folder=tmp_path)
