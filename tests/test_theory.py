"""Every section that a docstring, a page or a test cites as `THEORY n` is a heading of docs/theory.md."""

import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "theory.md"
SECTION = r"\d+(?:\.\d+)?"
CITATION = re.compile(rf"THEORY ({SECTION}(?:(?:, | and |, and )(?={SECTION}\b)(?:{SECTION}))*)")


def cited(text: str) -> set[str]:
    return {section for listed in CITATION.findall(text) for section in re.findall(SECTION, listed)}


def sources() -> Iterator[Path]:
    for folder in ("src", "docs", "tests", "benchmarks"):
        yield from (path for path in (ROOT / folder).rglob("*") if path.suffix in {".py", ".md", ".c", ".h"})


def test_a_list_of_sections_is_read_whole() -> None:
    assert cited("(THEORY 4.2, 4.3, 9), THEORY 3, and a refusal, THEORY 8 and 9.") == {"4.2", "4.3", "9", "3", "8"}


def test_every_cited_section_exists() -> None:
    sections = set(re.findall(rf"^##+ ({SECTION})\.? ", PAGE.read_text(), re.M))
    assert {str(n) for n in range(1, 12)} <= sections
    missing = {str(path.relative_to(ROOT)): cited(path.read_text()) - sections for path in sources()}
    assert not {path: found for path, found in missing.items() if found}


def test_the_citations_are_found() -> None:
    files = [path for path in sources() if path.suffix == ".py" and cited(path.read_text())]
    assert len(files) > 20
