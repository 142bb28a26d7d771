"""Every dotted name of docs/glossary.md exists, and no word of it has two rows."""

import re
from importlib import import_module
from pathlib import Path

import pytest

PAGE = (Path(__file__).parents[1] / "docs" / "glossary.md").read_text()
NAMES = sorted(set(re.findall(r"`((?:calibration|codec|kernels|models|records|studies)(?:\.\w+)+)(?:\(\))?`", PAGE)))


def test_no_word_is_explained_twice() -> None:
    words = re.findall(r"^\| ([^|]+) \|", PAGE, re.M)
    terms = [word for word in words if word not in {"word", "---"}]
    assert len(terms) > 30 and len(terms) == len(set(terms))


@pytest.mark.parametrize("name", NAMES)
def test_a_name_exists(name: str) -> None:
    path = name.split(".")
    if path[-1][0].isupper() or path[-1] == "ledger":
        assert hasattr(import_module(".".join(["eigencache", *path[:-1]])), path[-1])
    else:
        import_module(f"eigencache.{name}")
