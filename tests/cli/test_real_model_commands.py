"""The commands that docs/findings.md gives for public models run on random models of those very shapes."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from eigencache.calibration.accumulator import Accumulator, Columns
from eigencache.corpora.resolve import read_text
from eigencache.geometry import geometry_from_config, tensor_name
from eigencache.records.advice import Advice
from eigencache.records.base import SCOPES
from eigencache.records.probe import ProbeRecord
from eigencache.records.quality import SweepRecord
from public_configs import CONFIGS, config_of, random_checkpoint

pytestmark = pytest.mark.slow

PAGE = Path(__file__).parents[2] / "docs" / "findings.md"
HISTORY = PAGE.parent / "history" / "first-numbers.md"
TEXTS = {"wikitext2": ("held-out.txt", "stdlib:held-out"), "wikitext2:train": ("calibration.txt", "stdlib")}
CHARACTERS = 40_000
FEW = ("--tokens", "576", "--max-length", "32", "--calibration-tokens", "2048", "--batch-size", "18")
FEWER = {  # said again after the page's own words: the last one counts
    "probe": ("--tokens", "2048", "--max-length", "64"),
    "sweep": (*FEW, "--ranks", "16,full"),
    "mla": FEW,
    "recommend": FEW,
}
LEFT_OUT = {"sweep": ("Qwen", "Mistral"), "recommend": ("gpt2", "Mistral", "Llama")}  # not run: others have the same options
ALL_OF_THEM = """
import shlex, sys
from eigencache.cli.app import app
for line in sys.stdin:
    app(shlex.split(line), standalone_mode=False)
"""


def commands() -> dict[str, list[list[str]]]:
    """Model → the commands of the page that name it, as words after `eigencache`."""
    found: dict[str, list[list[str]]] = {}
    for line in re.findall(r"^eigencache (.*)$", PAGE.read_text().split("## Run it on the real models")[1], re.M):
        words = shlex.split(line)
        found.setdefault(words[1], []).append(words)
    return found


def option(words: list[str], name: str, default: str) -> str:
    return words[words.index(name) + 1] if name in words else default


def dtype_of(model: str, command: str) -> str:
    """What an accelerator takes by default. Many CPUs take ten times as long for bfloat16: two models measure in it."""
    own = CONFIGS[model].get("torch_dtype", "float32")
    measured = {"recommend": "Qwen/Qwen2.5-0.5B", "sweep": "meta-llama/Llama-3.2-1B"}
    return own if command == "probe" or measured.get(command) == model else "float32"


def test_every_model_has_its_commands() -> None:
    given = {model: [words[0] for words in lines] for model, lines in commands().items()}
    assert given.pop("deepseek-ai/DeepSeek-V2-Lite") == ["probe", "mla", "recommend"]
    assert given == {model: ["probe", "sweep", "recommend"] for model in list(CONFIGS)[:-1]}


@pytest.mark.parametrize("family", ["gpt2", "Qwen Mistral Llama", "DeepSeek"])
def test_the_commands_run_on_models_of_these_shapes(family: str, tmp_path: Path) -> None:
    for name, spec in TEXTS.values():
        text = "".join(document.text for document, _ in zip(read_text(spec).documents, range(20), strict=False))
        (tmp_path / name).write_text(text[:CHARACTERS])
    lines, outputs = [], {}
    for model in (name for name in CONFIGS if any(word in name for word in family.split())):
        folder = random_checkpoint(model, tmp_path / model.split("/")[1])
        replaced = {model: folder.name} | {spec: name for spec, (name, _) in TEXTS.items()}
        for words in commands()[model]:
            if any(word in model for word in LEFT_OUT.get(words[0], ())):
                continue
            local = [replaced.get(word, word) for word in words]
            lines.append(shlex.join([*local, *FEWER[words[0]], "--dtype", dtype_of(model, words[0])]))
            outputs[model, words[0]] = tmp_path / option(words, "-o", "")
    env = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(
        [sys.executable, "-c", ALL_OF_THEM], input="\n".join(lines), capture_output=True, text=True, cwd=tmp_path, env=env
    )
    assert result.returncode == 0, result.stderr
    for (model, command), path in outputs.items():
        CHECKS[command](path, dtype_of(model, command))


def check_probe(path: Path, dtype: str) -> None:
    record = ProbeRecord.load(path)
    geometry = record.model.geometry
    assert record.model.dtype == dtype
    assert "generic" not in record.model.adapter
    assert ("latent" if geometry.mla else "keys_pre_rope" if geometry.rope else "keys") in record.names


def check_sweep(path: Path, _dtype: str) -> None:
    record = SweepRecord.load(path)
    assert (record.corpus.name, record.calibration.name) == ("held-out.txt", "calibration.txt")
    assert all(abs(series.points[-1].quality.delta_nll) < 2e-3 for series in record.series)  # full rank
    names = [series.name for series in record.series]
    assert any("random basis" in name for name in names)
    assert any("post-RoPE" in name for name in names) == bool(record.model.geometry.rope)  # keys at their worst


def check_mla(path: Path, _dtype: str) -> None:
    record = SweepRecord.load(path)
    assert (record.corpus.name, record.calibration.name) == ("held-out.txt", "calibration.txt")
    assert {series.target for series in record.series} == {"latent", "key_rope", "k expanded", "v expanded"}
    assert all(abs(series.points[-1].quality.delta_nll) < 2e-3 for series in record.series)


def check_advice(path: Path, dtype: str) -> None:
    assert Advice.load(path).model.dtype == dtype


CHECKS = {"probe": check_probe, "sweep": check_sweep, "mla": check_mla, "recommend": check_advice}


@pytest.mark.parametrize("model", CONFIGS)
def test_the_commands_suit_a_model_of_full_size(model: str, tmp_path: Path) -> None:
    """Positions and the memory for moments, of the configuration as it is on the hub."""
    config = config_of(CONFIGS[model], tmp_path)
    geometry = geometry_from_config(config)
    shapes: dict[str, list[Columns]] = {}
    for layer in geometry.layers:
        rotated = ("pre_rope", "post_rope") if geometry.rope else ("unrotated",)
        sizes = {tensor_name("keys", frame): (layer.num_key_value_heads, layer.head_dim) for frame in rotated}
        sizes["values"] = (layer.num_key_value_heads, layer.v_head_dim)
        if mla := layer.mla:
            sizes = {tensor_name("key_rope", frame): (1, mla.qk_rope_head_dim) for frame in rotated}
            sizes |= {"latent": (1, mla.kv_lora_rank), "keys_nope": (layer.num_attention_heads, mla.qk_nope_head_dim)}
            sizes["values"] = (layer.num_attention_heads, layer.v_head_dim)
        for name, (heads, dim) in sizes.items():
            shapes.setdefault(name, []).append(Columns(layer.layer_idx, heads, dim, layer.layer_idx * heads * dim))
    for words in commands()[model]:
        assert int(option(words, "--max-length", "512")) <= config.max_position_embeddings
        if words[0] == "probe":
            budget = float(option(words, "--memory", "6")) * 2**30  # the default is 60 % of what is free
            assert Accumulator(shapes, SCOPES, sequences=64, tokens=32_768, budget=int(budget)).folds >= 4


def test_repeated_sentences_raise_the_energy_of_random_weights(tmp_path: Path) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", HISTORY.read_text(), re.S)
    (tmp_path / "example.py").write_text(example.replace("131_072", "4_096"))
    env = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    result = subprocess.run([sys.executable, "example.py"], capture_output=True, text=True, cwd=tmp_path, env=env)
    assert result.returncode == 0, result.stderr
    energies = {name: float(energy) for name, energy in re.findall(r"^(.*): energy@32 (\d\.\d+)", result.stdout, re.M)}
    for kind in ("keys", "values"):
        repeated, this_text, held_out = (
            energies[f"{text}, {kind}"] for text in ("four repeated sentences", "this text", "held out")
        )
        assert repeated > 1.4 * this_text
        assert held_out <= this_text
    assert result.stdout.count("Not compressible") == 4, "the original bound of 0.8 is not reached by random weights"
