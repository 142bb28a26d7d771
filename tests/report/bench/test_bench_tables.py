"""Tables, plot and pages of a bench: every cell computed by hand, all points present, every string escaped."""

import re
import shlex
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from eigencache.errors import OutputError
from eigencache.records.base import Interval
from eigencache.records.bench import BenchPoint, BenchRecord, EqualLoss
from eigencache.records.quality import Accuracy, Divergence, Retrieval
from eigencache.report.bench.equal_divergence import against_by_divergence_table, divergences_table
from eigencache.report.bench.equal_loss import against_table, frontier_table, significant
from eigencache.report.bench.page import file_name, generation_tables, markdown, page, tables_of, write_bench
from eigencache.report.bench.plot import plot_bench
from eigencache.report.bench.points import points_table
from eigencache.report.core.measured import ABSENT
from eigencache.report.core.table import Table
from planted_sweeps import CORPUS, RUN, model, quality

NASTY = '<b>&"|x'


def point(method: str, name: str, bits: float, delta: float, seed: int = 0, context: int = 384) -> BenchPoint:
    return BenchPoint(
        method=method,
        point=name,
        seed=seed,
        context=context,
        quality=quality(f"{method} {name}", 16 / bits, delta, 0.002),
        excess=[delta * 10] * 3,
    )


def equal(
    method: str, loss: float, bits: float | None, interval: Interval | None = None, why: str = "", context: int = 384
) -> EqualLoss:
    return EqualLoss(
        method=method,
        context=context,
        delta_nll=loss,
        bits_per_value=bits,
        interval=interval,
        by_seed=[bits],
        why=why,
    )


def bench(
    points: list[BenchPoint],
    found: list[EqualLoss],
    *,
    name: str = "planted-model",
    refused: dict[str, str] | None = None,
    warnings: list[str] | None = None,
    contexts: tuple[int, ...] = (384,),
    divergence: list[Divergence] | None = None,
    retrieval: list[Retrieval] | None = None,
) -> BenchRecord:
    return BenchRecord(
        model=model().model_copy(update={"name": name}),
        corpora=dict.fromkeys(contexts, CORPUS),
        calibration=CORPUS,
        scored=128,
        uncompressed_nll=dict.fromkeys(contexts, 2.5),
        refused=refused or {},
        points=points,
        equal_loss=found,
        divergence=divergence or [],
        retrieval=retrieval or [],
        run=RUN.model_copy(update={"settings": {"calibration_tokens": 65536}}),
        warnings=warnings or [],
    )


def planted(**options) -> BenchRecord:
    contexts = options.get("contexts", (384,))
    points = [
        point(method, f"{bits}", bits * factor, 0.05 / bits, seed, context)
        for context in contexts
        for method, factor in (("kvtc", 1.6), ("eigen", 1.0), ("int", 4.0))
        for bits in (0.5, 1, 2)
        for seed in ((0, 1) if method != "int" else (0,))
    ]
    found = [
        one
        for context in contexts
        for one in (
            equal("kvtc", 0.03, 2.5, (2.25, 2.777), context=context),
            equal("kvtc", 0.1, None, why="loses 0.0900 at its fewest, 0.8 bits", context=context),
            equal("eigen", 0.03, 1.25, None, context=context),
            equal("eigen", 0.1, 0.5, (0.4, 0.6), context=context),
            equal("int", 0.03, None, why="loses 0.0400 at its most, 8 bits", context=context),
            equal("int", 0.1, 4.0, context=context),
        )
    ]
    return bench(points, found, **options)


def cells(table: Table) -> dict[str, dict[str, str]]:
    return {row[0]: dict(zip(table.columns[1:], row[1:], strict=True)) for row in table.rows}


# Tables


def test_cells_are_bits_with_interval_or_which_end_was_not_reached() -> None:
    table = frontier_table(planted(refused={"xquant": "keys are narrow"}), 384)
    columns = ("Method", "Bits at ΔNLL 0.03", "Bits at ΔNLL 0.1", "Ratio at 0.03", "Ratio at 0.1")
    assert table.columns == (*columns, "Side information (MB)", "Break-even context (tokens)")
    found = cells(table)
    assert found["eigen"] == {
        "Bits at ΔNLL 0.03": "1.2 (no interval)",
        "Bits at ΔNLL 0.1": "0.5 [0.4, 0.6]",
        "Ratio at 0.03": "13 x",
        "Ratio at 0.1": "32 x",
        "Side information (MB)": "0.01",
        "Break-even context (tokens)": "29",
    }
    assert found["kvtc"]["Bits at ΔNLL 0.03"] == "2.5 [2.2, 2.8]"
    assert (found["kvtc"]["Bits at ΔNLL 0.1"], found["kvtc"]["Ratio at 0.1"]) == ("< 0.8", ABSENT)
    assert (found["int"]["Bits at ΔNLL 0.03"], found["int"]["Ratio at 0.03"]) == ("> 8", ABSENT)
    assert set(found["xquant"].values()) == {ABSENT}


def test_fewest_bits_at_the_usual_loss_come_first_and_what_is_refused_last() -> None:
    table = frontier_table(planted(refused={"a": "no", "xquant": "keys are narrow"}), 384)
    assert [row[0] for row in table.rows] == ["eigen", "kvtc", "int", "a", "xquant"]
    assert any("xquant does not support this model: keys are narrow." in note for note in table.notes)


def test_a_method_that_loses_less_at_its_fewest_bits_is_not_put_last_for_it() -> None:
    found = [equal("a", 0.03, 0.9), equal("b", 0.03, None), equal("c", 0.03, None)]
    record = bench([point("a", "1", 0.9, 0.03), point("b", "1", 0.6, 0.02), point("c", "1", 0.2, 0.1)], found)
    assert [row[0] for row in frontier_table(record, 384).rows] == ["b", "a", "c"]


def test_methods_alike_stay_in_the_order_they_were_asked_for() -> None:
    names = [f"m{i}" for i in range(12)]
    record = bench([point(m, "1", 1, 0.01) for m in names], [equal(m, 0.03, None) for m in names])
    assert [row[0] for row in frontier_table(record, 384).rows] == names


def test_notes_say_what_was_scored_fitted_and_counted() -> None:
    notes = " ".join(frontier_table(planted(), 384).notes)
    for words in (
        "384 tokens are compressed",
        "128 tokens are read",
        "40 sequences",
        "2.5000 nats",
        "65,536 tokens",
        "seeds 0, 1.",
    ):
        assert words in notes, words
    assert '"<": even the lowest rate tested loses less. ">": even the highest rate tested misses the target.' in notes
    assert '"k of n seeds": the median over all n seeds, of which k reach the target.' in notes
    assert "Ratio = bytes of the 16-bit cache / bytes of the compressed cache." in notes


@pytest.mark.parametrize(
    ("by_seed", "cell", "ratio"),
    [
        ([None, 1.25, 1.59], "1.6 (2 of 3 seeds)", "10 x"),  # KVTC on ref-deepseek: the README said > 3.43
        ([None, 4.91, 4.78], "4.9 (2 of 3 seeds)", "3.3 x"),  # OSCAR on ref-llama: the README said > 5
        ([4.70, None, 4.04], "4.7 (2 of 3 seeds)", "3.4 x"),
        ([None, None, 4.04], "> 8 (1 of 3 seeds)", ABSENT),
        ([None, None, None], "> 8", ABSENT),
    ],
)
def test_one_seed_without_a_crossing_makes_no_cell_that_none_crosses(by_seed: list, cell: str, ratio: str) -> None:
    found = equal("m", 0.03, None).model_copy(update={"by_seed": by_seed})
    row = cells(frontier_table(bench([point("m", "1", 1, 0.2), point("m", "2", 8, 0.1)], [found]), 384))["m"]
    assert (row["Bits at ΔNLL 0.03"], row["Ratio at 0.03"]) == (cell, ratio)


def test_no_cell_depends_on_a_sentence() -> None:
    for why in ("", "fewest", "anything, 7 bits"):
        found = equal("m", 0.03, None, why=why)
        table = frontier_table(bench([point("m", "1", 1, 0.2), point("m", "2", 8, 0.1)], [found]), 384)
        assert cells(table)["m"]["Bits at ΔNLL 0.03"] == "> 8"


@pytest.mark.parametrize(
    ("value", "interval", "shown"),
    [(0.216, (0.079, 0.553), "0.22"), (1.2345, (1.23, 1.24), "1.23"), (1.2345, None, "1.2"), (12.86, (10, 15), "13")],
)
def test_no_more_digits_are_printed_than_an_interval_carries(value: float, interval, shown: str) -> None:
    assert significant(value, interval) == shown


def test_every_point_is_listed_with_its_basis() -> None:
    record = planted(contexts=(384, 1920))
    table = points_table(record, 1920)
    assert len(table.rows) == len(record.points) // 2
    row = next(row for row in table.rows if row[:3] == ("kvtc", "1", "1"))
    assert row[3:] == ("1.600", "10.00", "0.0500 [0.0480, 0.0520]", "0.0500", "99.0 %", "0.01", "28")


def test_against_ours_bits_are_ratios_and_what_never_gets_there_is_said() -> None:
    table = against_table([planted(), planted(name="other")], "eigen")
    assert table.columns[1:] == tuple(f"{m} 384 at {loss:g}" for m in ("planted-model", "other") for loss in (0.03, 0.1))
    assert cells(table)["kvtc"]["planted-model 384 at 0.03"] == "2"
    assert cells(table)["kvtc"]["other 384 at 0.1"] == ABSENT
    assert cells(table)["int"]["planted-model 384 at 0.03"] == ">"
    assert cells(table)["int"]["planted-model 384 at 0.1"] == "8"
    assert "eigen" not in cells(table)


def test_bits_at_equal_kl_are_read_off_every_seed() -> None:
    def curve(method: str, factor: float, seed: int) -> list[BenchPoint]:  # KL = 0.1 / bits^2, bits times a factor
        made = [point(method, f"{bits}", factor * bits, 0.0, seed) for bits in (0.5, 1.0, 2.0, 4.0)]
        return [
            p.model_copy(update={"quality": p.quality.model_copy(update={"kl": 0.1 / bits**2})})
            for p, bits in zip(made, (0.5, 1.0, 2.0, 4.0), strict=True)
        ]

    points = [*curve("eigen", 1, 0), *curve("eigen", 4, 1), *curve("other", 6, 0)]
    record = bench(points, [equal("eigen", 0.03, 0.5)])
    rows = {row[0]: row[1:] for row in divergences_table(record, 384).rows}
    assert rows["eigen"][:4] == ("> 4", f"{2 * 10**0.5:.3g}", f"{2 * (1 / 0.3) ** 0.5:.3g}", "2")  # 2: mean of 1 and 4
    assert rows["other"][3] == "6" and rows["other"][7] == "2.7 x"
    assert list(rows) == ["eigen", "other"]
    (against,) = against_by_divergence_table([record], "eigen").rows
    assert against == ("other", ABSENT, "3.00", "3.00", "3.00")


def test_a_model_that_ours_is_refused_for_has_dashes() -> None:
    other = bench([point("int", "4", 4, 0.01)], [equal("int", 0.03, 4.0)], name="other", refused={"eigen": "no"})
    found = cells(against_table([planted(), other], "eigen"))
    assert found["int"]["other 384 at 0.03"] == ABSENT and found["kvtc"]["other 384 at 0.03"] == ABSENT
    found = cells(against_by_divergence_table([planted(), other], "eigen"))
    assert set(found["int"][name] for name in found["int"] if name.startswith("other")) == {ABSENT}
    assert set(found["kvtc"][name] for name in found["kvtc"] if name.startswith("other")) == {ABSENT}


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


# The plot


def test_the_plot_draws_every_method_and_no_two_alike() -> None:
    names = [f"method {i}" for i in range(30)]
    points = [point(m, f"{b}", b, d, context=c) for m in names for b, d in ((1, 0.1), (2, -0.001)) for c in (384, 1920)]
    figure = plot_bench(bench(points, [equal("method 0", 0.03, 1.5)], contexts=(384, 1920)))
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == names
    assert len(figure.axes) == 2 and all(len(axes.containers) == 30 for axes in figure.axes)
    styles = {(line.get_color(), line.get_marker()) for line in (c.lines[0] for c in figure.axes[0].containers)}
    assert len(styles) == 30
    assert {axes.get_title() for axes in figure.axes} == {"context 384 tokens", "context 1,920 tokens"}


def test_lines_are_means_over_seeds_with_bits_ascending() -> None:
    points = [
        point("m", name, bits, delta, seed) for name, bits, delta in (("b", 2, 0.01), ("a", 1, 0.1)) for seed in range(2)
    ]
    points[-1] = point("m", "a", 1, 0.3, 1)
    (container,) = plot_bench(bench(points, [])).axes[0].containers
    np.testing.assert_allclose(container.lines[0].get_xydata(), [[1, 0.2], [2, 0.01]])


def test_a_method_without_a_point_at_one_length_is_left_out_there() -> None:
    points = [point("a", "1", 1, 0.1), point("a", "1", 1, 0.1, context=1920), point("b", "1", 1, 0.1)]
    figure = plot_bench(bench(points, [], contexts=(384, 1920)))
    assert [len(axes.containers) for axes in figure.axes] == [2, 1]


# Pages


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
