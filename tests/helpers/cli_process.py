"""The command line in a process of its own, as its user calls it, with what it printed.

Importing PyTorch and transformers takes longer than most commands, so one server imports them and every command runs in a
fork of it. `python -m eigencache` itself is started by tests/cli/test_end_to_end.py.
"""

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Mapping
from functools import cache
from multiprocessing.context import ForkServerContext
from pathlib import Path

ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "250"}
_PRELOADED = [
    "eigencache.cli.app",
    "eigencache.api",
    "eigencache.studies.bench.run",
    "matplotlib.pyplot",
]


def run(
    *arguments: object, folder: Path, script: str | None = None, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """`python -m eigencache …`, or `python SCRIPT …`, in a folder; offline, wide, one thread."""
    command = [script or "eigencache", *map(str, arguments)]
    environment = os.environ | ENVIRONMENT | dict(env or {})
    with tempfile.TemporaryDirectory() as own:
        streams = [Path(own, name) for name in ("stdout", "stderr")]
        process = _server().Process(target=_called, args=(command, script, folder, environment, streams))
        process.start()
        process.join(600)
        if process.is_alive():
            process.kill()
            raise TimeoutError(f"{command} was still running after 600 seconds")
        out, err = (stream.read_text(encoding="utf-8") if stream.exists() else "" for stream in streams)
    return subprocess.CompletedProcess(command, process.exitcode or 0, out, err)


@cache
def _server() -> ForkServerContext:
    """Starts the server, whose environment is read while modules are imported."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    before = dict(os.environ)
    os.environ.update(ENVIRONMENT)
    try:
        context.Process(target=int).start()  # starts the server beside a child that does nothing
    finally:
        os.environ.clear()
        os.environ.update(before)
    return context


def _called(command: list[str], script: str | None, folder: Path, environment: dict[str, str], streams: list[Path]) -> None:
    """In the fork: run the command with its own streams, folder and environment, and end as Python does."""
    for number, stream in zip((1, 2), streams, strict=True):
        os.dup2(os.open(stream, os.O_CREAT | os.O_WRONLY | os.O_TRUNC), number)
    encoding = environment.get("PYTHONIOENCODING", "utf-8")
    sys.stdout = open(1, "w", encoding=encoding, closefd=False)  # noqa: SIM115 - open until the process ends
    sys.stderr = open(2, "w", encoding=encoding, errors="backslashreplace", closefd=False)  # noqa: SIM115
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.argv = command
    try:
        if script is None:
            runpy.run_module("eigencache", run_name="__main__")
        else:
            runpy.run_path(script, run_name="__main__")
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:  # noqa: BLE001 - shown, as Python itself does
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


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
