"""Tables at equal ΔNLL: every cell computed by hand."""

import pytest

from eigencache.report.bench.equal_divergence import against_by_divergence_table
from eigencache.report.bench.equal_loss import against_table, frontier_table, significant
from eigencache.report.core.measured import ABSENT
from planted_benches import bench, cells, equal, planted, point


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


def test_against_ours_bits_are_ratios_and_what_never_gets_there_is_said() -> None:
    table = against_table([planted(), planted(name="other")], "eigen")
    assert table.columns[1:] == tuple(f"{m} 384 at {loss:g}" for m in ("planted-model", "other") for loss in (0.03, 0.1))
    assert cells(table)["kvtc"]["planted-model 384 at 0.03"] == "2"
    assert cells(table)["kvtc"]["other 384 at 0.1"] == ABSENT
    assert cells(table)["int"]["planted-model 384 at 0.03"] == ">"
    assert cells(table)["int"]["planted-model 384 at 0.1"] == "8"
    assert "eigen" not in cells(table)


def test_a_model_that_ours_is_refused_for_has_dashes() -> None:
    other = bench([point("int", "4", 4, 0.01)], [equal("int", 0.03, 4.0)], name="other", refused={"eigen": "no"})
    found = cells(against_table([planted(), other], "eigen"))
    assert found["int"]["other 384 at 0.03"] == ABSENT and found["kvtc"]["other 384 at 0.03"] == ABSENT
    found = cells(against_by_divergence_table([planted(), other], "eigen"))
    assert set(found["int"][name] for name in found["int"] if name.startswith("other")) == {ABSENT}
    assert set(found["kvtc"][name] for name in found["kvtc"] if name.startswith("other")) == {ABSENT}
