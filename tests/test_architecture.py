"""docs/architecture.md names every folder of the package, and the floors as the import contract has them."""

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "eigencache"
PAGE = (ROOT / "docs" / "architecture.md").read_text()


def section(name: str) -> str:
    return PAGE.split(f"\n## {name}\n")[1].split("\n## ")[0]


def test_the_page_lists_every_folder() -> None:
    listed = re.findall(r"^\| `([\w/]+)/` \|", section("Folders"), re.M)
    folders = sorted(str(path.parent.relative_to(SOURCE)) for path in SOURCE.glob("*/**/__init__.py"))
    assert listed == folders


def test_the_floors_are_those_of_the_contract() -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    (layers,) = (one["layers"] for one in contracts if one["type"] == "layers")
    rows = re.findall(r"^\| (`.*?) \|", section("Floors"), re.M)
    assert [set(re.findall(r"`(\w+)`", row)) for row in rows] == [
        set(layer.replace("eigencache.", "").split(" | ")) for layer in layers
    ]
