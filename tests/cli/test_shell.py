"""What a shell may have: another encoding, a byte order mark in a file, the wish for a version."""

import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

import eigencache
from cli_process import run, shown
from eigencache.records.provenance import peak_memory_mb

pytestmark = pytest.mark.slow


def test_the_version_is_that_of_the_package(tmp_path: Path) -> None:
    assert eigencache.__version__ == version("eigencache")
    assert shown(run("--version", folder=tmp_path)) == f"eigencache {version('eigencache')}\n"


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_a_terminal_of_any_encoding_gets_all_of_a_table(encoding: str, tmp_path: Path) -> None:
    env = os.environ | {"PYTHONIOENCODING": encoding, "PYTHONUTF8": "0", "OMP_NUM_THREADS": "1"}
    record = Path(__file__).parents[2] / "docs" / "leaderboard" / "bundled" / "ref-llama.json"
    code = (
        "import sys; from eigencache.cli.app import main\n"
        "from eigencache.report.bench.equal_loss import frontier_table\nfrom eigencache.records.bench import BenchRecord\n"
        "import eigencache.cli.score as score\n"
        "sys.argv = ['eigencache', '--help']\n"
        "try: main()\nexcept SystemExit: pass\n"
        f"print(frontier_table(BenchRecord.load({str(record)!r}), 384).markdown())"
    )
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr.decode()
    words = done.stdout.decode(encoding)
    assert "eigen-no-text" in words and ("ΔNLL" in words) == (encoding == "utf-8")


def test_a_prompt_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "prompt.txt").write_bytes("\ufeffimport os".encode())
    result = run("generate", "ref-llama", "--codec", "absent", "--prompt-file", "prompt.txt", folder=tmp_path)
    assert result.returncode == 2 and "absent" in result.stderr and "UTF-8" not in result.stderr


def test_memory_is_not_known_without_the_module_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert peak_memory_mb() > 0
    monkeypatch.setattr("eigencache.records.provenance.resource", None)
    assert peak_memory_mb() == 0
