"""Every command of a benchmark that the documentation shows names a script and options that exist."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
COMMAND = re.compile(r"python benchmarks/(\w+\.py)((?:\\\n|[^`\n#])*)")
COMMANDS = sorted({(script, " ".join(rest.split())) for page in PAGES for script, rest in COMMAND.findall(page.read_text())})


def constants(script: str) -> set[str]:
    """Return all strings in the source of a script."""
    tree = ast.parse((ROOT / "benchmarks" / script).read_text())
    return {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}


def test_there_are_commands() -> None:
    assert len(COMMANDS) > 5


@pytest.mark.parametrize(("script", "arguments"), COMMANDS, ids=[" ".join(command) for command in COMMANDS])
def test_a_command_of_the_documentation_has_options_that_exist(script: str, arguments: str) -> None:
    known = constants(script)
    assert set(re.findall(r"--[a-z-]+", arguments)) <= known
    for parts in re.findall(r"--parts ([a-z,]+)", arguments) if script == "ablations.py" else ():
        assert set(parts.split(",")) <= known
