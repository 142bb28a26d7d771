"""The command line in a process of its own, as its user calls it, with what it printed."""

import os
import subprocess
import sys
from pathlib import Path


def run(*arguments: object, folder: Path) -> subprocess.CompletedProcess[str]:
    """`python -m eigencache …` in a folder; offline, wide, one thread."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "250"}
    command = [sys.executable, "-m", "eigencache", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=folder, env=env)


def shown(result: subprocess.CompletedProcess[str]) -> str:
    """What a run that went well printed."""
    assert result.returncode == 0, result.stderr
    return result.stdout


def error_of(result: subprocess.CompletedProcess[str]) -> str:
    """The one line of a user's mistake; anything else on stderr is a defect."""
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr
    lines = [line for line in result.stderr.splitlines() if line.startswith("eigencache: error: ")]
    assert len(lines) == 1, result.stderr
    return lines[0].removeprefix("eigencache: error: ")
