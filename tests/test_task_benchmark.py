"""The script that scores tasks with compressed prompts: its judges, and a run of it."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).resolve().parent.parent / "benchmarks" / "tasks.py"
PROBLEM = {
    "task_id": "HumanEval/0",
    "prompt": "def twice(x):\n",
    "entry_point": "twice",
    "test": "def check(candidate):\n    assert candidate(3) == 6\n",
}
NEEDLES = {"index": 0, "input": "One magic number is 7. " * 20 + "The numbers are", "outputs": ["7", "absent"]}


@pytest.fixture(scope="module")
def tasks() -> ModuleType:
    spec = importlib.util.spec_from_file_location("tasks_benchmark", SCRIPT)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("answer", "passed"),
    [
        ("    return 2 * x\n\ndef check(c): pass", True),  # what follows the function is cut off
        ("    return x", False),
        ("    while True: pass", False),
        ("    return (", False),
    ],
)
def test_code_is_judged_by_its_tests(tasks: ModuleType, answer: str, passed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "TIMEOUT", 2)
    assert tasks.passes(PROBLEM, answer) is passed


@pytest.mark.parametrize(
    ("task", "answer", "score"),
    [("niah_single_1", "It is 7", 0.5), ("niah_single_1", "7, ABSENT", 1), ("vt", "none", 0), ("qa_1", "7", 1)],
)
def test_the_score_of_ruler_counts_expected_strings(tasks: ModuleType, task: str, answer: str, score: float) -> None:
    assert tasks.ruler_example(task, NEEDLES).score(answer) == score


def test_a_run_keeps_its_answers_and_adds_codecs(
    tasks: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*arguments: str | Path) -> str:
        monkeypatch.setattr(sys, "argv", ["tasks.py", "ref-llama", *map(str, arguments)])
        tasks.main()
        return capsys.readouterr().out

    ruler, code, output = tmp_path / "fwe" / "validation.jsonl", tmp_path / "HumanEval.jsonl", tmp_path / "answers.json"
    ruler.parent.mkdir()
    ruler.write_text(json.dumps(NEEDLES))
    code.write_text(json.dumps(PROBLEM))
    options = ("--calibration-tokens", "4096", "--output", output, "--data", ruler)
    with pytest.raises(SystemExit, match="--execute"):
        run(*options, code, "--codecs", "int:8")
    assert not output.exists()
    run(*options, code, "--codecs", "int:8", "--execute")
    first = json.loads(output.read_text())
    table = run(*options, "--codecs", "int:8,int:2", "--markdown")
    both = json.loads(output.read_text())
    assert [line["task"] for line in both] == ["fwe", "HumanEval"] and table.count("| fwe |") == 3
    results = both[0]["results"]
    assert results["uncompressed"] == first[0]["results"]["uncompressed"]
    assert results["uncompressed"]["bits"] == 16 and 8 < results["int:8"]["bits"] < 10 and 2 < results["int:2"]["bits"] < 4
    with pytest.raises(SystemExit, match="int has 8, 4, 3, 2"):
        run(*options, "--codecs", "eigen:1,int:7")  # said before a fit
    with pytest.raises(SystemExit, match="give METHOD:POINT"):
        run(*options, "--codecs", "eigen")
