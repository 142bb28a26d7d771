"""The package's metadata agree with its sources: dependencies, pins, version, and the type marker."""

import ast
import re
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path

import eigencache

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "eigencache"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
DISTRIBUTIONS = {"lm_eval": "lm-eval", "optimum": "optimum-quanto"}  # by the name that is imported


def names_of(requirements: list[str]) -> set[str]:
    return {re.split(r"[^\w.-]", one, maxsplit=1)[0].lower().replace("_", "-") for one in requirements}


def imports_of(tree: ast.AST) -> set[str]:
    nodes = list(ast.walk(tree))
    plain = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    return plain | {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module and not node.level}


def test_every_import_is_a_declared_dependency() -> None:
    declared = names_of(PROJECT["dependencies"]) | set.union(*map(names_of, EXTRAS.values()))
    imported = {name.split(".")[0] for path in SOURCE.rglob("*.py") for name in imports_of(ast.parse(path.read_text()))}
    imported -= {*sys.stdlib_module_names, "eigencache"}
    needed = {DISTRIBUTIONS.get(name, name).replace("_", "-") for name in imported}
    assert needed <= declared, needed - declared


def test_constraints_pin_what_make_installs() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in lines)
    installed = names_of(
        [*PROJECT["dependencies"], *(one for extra in ("report", "peers", "docs", "dev") for one in EXTRAS[extra])]
    )
    assert installed - {"eigencache", "triton"} <= names_of(lines)


def test_the_version_is_stated_once() -> None:
    cited = re.search(r"^version: (.*)$", (ROOT / "CITATION.cff").read_text(), re.M)
    assert cited and cited[1] == PROJECT["version"] == version("eigencache") == eigencache.__version__


def test_the_package_is_typed() -> None:
    assert (SOURCE / "py.typed").read_text() == ""


def test_the_workflow_runs_the_targets_of_the_local_run() -> None:
    targets = re.findall(r"^make ([\w-]+)$", (ROOT / ".ci" / "run").read_text(), re.M)
    workflow = (ROOT / ".github" / "workflows" / "ci.yml").read_text()
    listed = re.search(r"target: \[(.*)\]", workflow)
    assert listed and set(targets) <= set(listed[1].split(", "))
