"""The pages of a bench: all tables present, every string escaped, nothing loaded."""

import re
import shlex
from html.parser import HTMLParser
from pathlib import Path

import pytest

from eigencache.errors import OutputError
from eigencache.records.bench import BenchRecord
from eigencache.records.quality import Accuracy, Divergence, Retrieval
from eigencache.report.bench.equal_loss import frontier_table
from eigencache.report.bench.page import file_name, generation_tables, markdown, page, tables_of, write_bench
from eigencache.report.bench.plot import plot_bench
from eigencache.report.core.measured import ABSENT
from planted_benches import bench, equal, planted, point

NASTY = '<b>&"|x'


ACCURACY = Accuracy(codec="uncompressed", correct=8, examples=10, interval=(0.49, 0.94))
RETRIEVAL = Retrieval(
    task="copy",
    length=384,
    depth=0.5,
    answer_tokens=8,
    chance=0.0,
    threshold=0.1,
    applicable=True,
    uncompressed=ACCURACY,
    results=[ACCURACY.model_copy(update={"codec": "eigen 1", "correct": 7})],
)
DIVERGENCE = Divergence(codec="eigen 1", prompt_tokens=384, new_tokens=64, tokens_until_parting=[64, 10], agreement=[1, 0.5])


def test_generation_and_retrieval_are_shown_where_they_were_measured() -> None:
    assert generation_tables(planted()) == []
    record = planted(divergence=[DIVERGENCE], retrieval=[RETRIEVAL])
    divergence, retrieval = generation_tables(record)
    assert divergence.rows == (("eigen 1", "2 of 384 tokens", "64", "37.0", "37", "75.0 %", "1"),)
    assert retrieval.rows == (("copy", "384", "0.5", "0.80", "0.70"),)
    assert len(tables_of(record)) == 4  # two frontiers


def test_a_record_of_nothing_but_refusals_is_shown() -> None:
    record = bench([], [], refused={"xquant": "keys are narrow"})
    assert frontier_table(record, 384).rows == (("xquant", ABSENT, ABSENT),)
    assert "keys are narrow" in markdown([record], "c") and "keys are narrow" in page([record], {record.model.name: ""})
    assert plot_bench(record).axes


class Page(HTMLParser):
    """Every start tag, and whether tags are closed in order."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.open: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href", "xlink:href") and value]
        if tag not in ("meta", "br", "path", "use", "link"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag in ("path", "use"):
            return
        assert self.open.pop() == tag


def parsed(html: str) -> Page:
    found = Page()
    found.feed(html)
    assert not found.open
    return found


def nasty() -> BenchRecord:
    name = f"org/{NASTY}"
    points = [point(NASTY, NASTY, 1, 0.01), point(NASTY, "2", 2, 0.001), point("eigen", "1", 1, 0.01)]
    found = [equal(NASTY, 0.03, 1.0, (0.9, 1.1)), equal("eigen", 0.03, 0.5)]
    return bench(points, found, name=name, refused={f"r{NASTY}": f"why {NASTY}"}, warnings=[f"OVERLAP {NASTY}"])


def test_html_is_escaped_offline_and_complete(tmp_path: Path) -> None:
    record = nasty()
    write_bench([record, planted()], tmp_path, "eigencache bench")
    html = (tmp_path / "bench.html").read_text()
    found = parsed(html)
    assert "<b>" not in html and "b" not in found.tags
    assert found.tags.count("svg") == 2 and found.tags.count("table") == 2 + 2 * 3  # ours, three a model
    assert all(link.startswith("#") for link in found.links)
    for words in ("OVERLAP &lt;b&gt;&amp;&quot;|x", "why &lt;b&gt;", "All operating points", "planted-model", "[0.9, 1.1]"):
        assert words in html, words
    assert html.index("OVERLAP") < html.index("<svg")


def test_markdown_is_escaped_and_complete() -> None:
    text = markdown([nasty(), planted()], shlex.join(["eigencache", "bench", "my model"]))
    assert "Printed by `eigencache bench 'my model'`." in text
    assert text.count("![loss by bytes](") == 2 and "![loss by bytes](planted-model.svg)" in text
    assert "> **WARNING** OVERLAP" in text and "0.9, 1.1" in text
    tables = re.findall(r"(?:^\|.*\|\n)+", text, re.MULTILINE)
    assert len(tables) == 6  # two against ours, two frontiers of each model
    for table in tables:
        bars = {len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}
        assert len(bars) == 1, table


def test_without_ours_nothing_is_in_its_units() -> None:
    record = bench([point("int", "4", 4, 0.01)], [equal("int", 0.03, 4.0)])
    assert "relative to" not in markdown([record], "c") + page([record], {record.model.name: "<svg></svg>"})


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("ref-llama", "ref-llama"),
        ("meta-llama/Llama-3.2-1B", "meta-llama--Llama-3.2-1B"),
        ("/models/mine", "models--mine"),
        ("./mine", "mine"),
        ("../up/mine.gguf", "up--mine.gguf"),
        (".", "model"),
    ],
)
def test_files_are_named_by_the_model_and_stay_in_the_folder(name: str, file: str, tmp_path: Path) -> None:
    assert file_name(name) == file
    written = write_bench([planted(name=name)], tmp_path / "out", "eigencache bench")
    expected = {"README.md", "bench.html", f"{file}.svg", f"{file}.json"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == expected == {path.name for path in written}
    assert {path.name for path in tmp_path.iterdir()} == {"out"}
    assert f"]({file}.svg)" in (tmp_path / "out" / "README.md").read_text()


def test_the_folder_holds_every_record_as_it_was_and_the_same_bytes_again(tmp_path: Path) -> None:
    records = [planted(), planted(name="other model", contexts=(384, 1920))]
    for folder in ("a", "b"):
        write_bench(records, tmp_path / folder, "eigencache bench")
    assert BenchRecord.load(tmp_path / "a" / "other model.json") == records[1]
    assert "![loss by bytes](other%20model.svg)" in (tmp_path / "a" / "README.md").read_text()
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes(), path.name


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be written"):
        write_bench([planted()], tmp_path / "file", "eigencache bench")
