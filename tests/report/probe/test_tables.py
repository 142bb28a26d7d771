"""Tables say what is missing and what is doubtful, and their numbers are those of the record."""

import math

import pytest
from rich.console import Console

from eigencache.records.probe import ProbeRecord
from eigencache.report.core.measured import ABSENT
from eigencache.report.core.series import spreads
from eigencache.report.core.table import Table
from eigencache.report.probe.comparison import classic_table, compare_table
from eigencache.report.probe.dead import named_layers
from eigencache.report.probe.spread_table import spread_table
from eigencache.report.probe.tables import geometry_lines, probe_table
from eigencache.report.quality.score import score_table


def shown(table: Table, width: int = 200) -> str:
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(table)
    return console.export_text()


def row_of(table: Table, layer: str, tensor: str) -> dict[str, str]:
    (row,) = [row for row in table.rows if row[0] == layer and row[1] == tensor]
    return dict(zip(table.columns, row, strict=True))


def test_a_row_of_the_probe_table_holds_the_numbers_of_its_spectrum(gqa) -> None:
    (spectrum,) = gqa.select("values", "layer", 1)
    row = row_of(probe_table(gqa), "1", "values")
    assert row["Rank .90"].rstrip("!") == str(spectrum.rank_90)
    assert row["Width"] == str(spectrum.width)
    assert row["Effective rank [95\u00a0%]"].startswith(f"{spectrum.effective_rank:.1f}")
    assert row["Held-out energy@k"].rstrip("!") == f"{spectrum.held_out_energy[int(row['k'])]:.3f}"


@pytest.mark.parametrize(("support", "rank", "tail"), [(100.0, "12", "14"), (20.0, "12", "14!"), (5.0, "12!", "14!")])
def test_doubt_is_marked_by_support(edited, gqa, support: float, rank: str, tail: str) -> None:
    record = edited(gqa, "values", support=support, rank_90=12, rank_99=14, intervals={})
    row = row_of(probe_table(record), "0", "values")
    assert (row["Rank .90"], row["Rank .99"]) == (rank, tail)


def test_a_refused_number_is_a_dash_and_its_reason_is_printed_once(scarce) -> None:
    table = probe_table(scarce)
    assert any(ABSENT in row for row in table.rows)
    text = shown(table)
    for warning in scarce.warnings:
        assert text.replace("\n", " ").count(warning[:60]) == 1


def test_an_infinite_spread_is_said(edited, gqa) -> None:
    table = spread_table(edited(gqa, "values", spread=math.inf))
    assert "∞" in row_of_first(table, "0")["values"]


@pytest.fixture
def with_dead(gqa) -> ProbeRecord:
    """Three dead dimensions of keys before rotation in layer 0 and one in layer 1; one of keys as cached in layer 1."""
    dead = {("keys_pre_rope", 0): [1, 4, 9], ("keys_pre_rope", 1): [2], ("keys_post_rope", 1): [2]}
    changed = [s.model_copy(update={"dead": dead.get((s.name, s.layer_idx), [])}) for s in gqa.spectra]
    return gqa.model_copy(update={"spectra": changed})


def test_dead_dimensions_are_counted_by_layer_and_named_in_a_sentence(with_dead) -> None:
    table = spread_table(with_dead)
    assert [row[-2:] for row in table.rows] == [("3", "0"), ("1", "1"), ("4 in all", "1 in all")]
    assert table.columns[-2:] == ("keys_pre_rope dead", "keys_post_rope dead")
    sentences = [note for note in table.notes if "dead" in note]
    assert sentences == [
        "keys_pre_rope: 4 dead dimensions in 2 of 2 layers (they never vary, and spreads leave them out): "
        "1 in layer 1; 3 in layer 0",
        "keys_post_rope: 1 dead dimension in 1 of 2 layers (they never vary, and spreads leave them out): 1 in layer 1",
    ]
    whole = probe_table(with_dead)
    assert set(sentences) <= set(whole.notes)
    assert row_of(whole, "0", "keys_pre_rope")["Dead dim."] == "3"
    assert row_of(whole, "0", "values")["Dead dim."] == "0"
    assert row_of(whole, "mean", "keys_pre_rope")["Dead dim."] == "4 in all"


def test_the_comparison_names_the_models_whose_spreads_leave_out_dimensions(with_dead, mha) -> None:
    notes = [note for note in compare_table([with_dead, mha]).notes if "dead" in note]
    assert notes == [
        f"{with_dead.model.name.split('/')[1]}: spreads leave out dimensions that never vary: "
        "4 dead dimensions in 2 of 2 layers of keys_pre_rope, 1 dead dimension in 1 of 2 layers of keys_post_rope"
    ]


def test_nothing_is_said_of_dead_dimensions_where_there_are_none(gqa, mla) -> None:
    for record in (gqa, mla):
        for table in (spread_table(record), probe_table(record), compare_table([record])):
            assert "dead" not in shown(table, 400).lower()


@pytest.mark.parametrize(
    ("layers", "text"),
    [([3], "layer 3"), ([0, 1], "layers 0, 1"), ([5, 0, 2, 1, 7, 8], "layers 0–2, 5, 7, 8")],
)
def test_neighboring_layers_are_named_as_a_range(layers: list[int], text: str) -> None:
    assert named_layers(layers) == text


def test_a_tensor_without_any_live_dimension_has_no_spread(edited, gqa) -> None:
    record = edited(gqa, "values", spread=None, spread_p95_p5=None, dead=list(range(64)))
    assert row_of_first(spread_table(record), "0")["values"] == ABSENT
    assert row_of_first(spread_table(record), "0")["K/V pre-RoPE"] == ABSENT
    assert row_of(probe_table(record), "0", "values")["Spread"] == ABSENT
    assert spreads(record, "values") == ([0.0, 1.0], [None, None])


def row_of_first(table: Table, layer: str) -> dict[str, str]:
    (row,) = [row for row in table.rows if row[0] == layer]
    return dict(zip(table.columns, row, strict=True))


def test_the_comparison_begins_with_the_historic_columns(all_records) -> None:
    table = compare_table(all_records)
    expected = ("Model", "K energy@32", "V energy@32", "K effective rank", "V effective rank", "Assessment")
    assert table.columns[:6] == expected
    assert len(table.rows) == len(all_records) + 1, "an MLA model has a second row for its latent"


def test_the_historic_view_says_by_how_much_it_flatters(gqa) -> None:
    table = classic_table(gqa)
    (row,) = [r for r in gqa.classic if r.kind == "values" and "repeated" not in r.text]
    (cells,) = [r for r in table.rows if r[0] == "values" and r[1] == row.text]
    assert cells[table.columns.index("Energy@16")].rstrip("!") == f"{row.energy_16:.3f}"
    assert any(r[-1].startswith(("too high by", "too low by", "equal")) or r[-1] == ABSENT for r in table.rows)


def test_the_spread_table_of_mla_says_what_the_equalization_is_worth(mla) -> None:
    table = spread_table(mla)
    assert {"latent", "key_rope_post_rope", "keys_nope", "values"} <= set(table.columns)
    assert any(note.startswith("Equalization") for note in table.notes)


def test_geometry_is_told_with_bytes_and_the_width_ratio(gqa) -> None:
    text = "\n".join(geometry_lines(gqa))
    assert f"{gqa.model.geometry.values_per_token * 2} bytes per token at 16 bit" in text
    assert text.count(f"{gqa.model.geometry.width_ratio:.2f}") == 1 and "redundant" not in text


@pytest.mark.parametrize("width", [40, 80, 200])
def test_no_row_is_wider_than_the_terminal_and_no_number_is_cut(gqa, width: int) -> None:
    lines = shown(probe_table(gqa), width).splitlines()
    assert max(map(len, lines)) <= width
    assert "…" not in "".join(lines)


def test_markdown_escapes_bars_and_html_escapes_tags() -> None:
    table = Table("<b>", ("a|b", "n"), (("x|<script>", "1"),))
    assert "a\\|b" in table.markdown()
    assert "<script>" not in table.html()
    assert "&lt;script&gt;" in table.html()


def test_an_empty_list_of_scores_is_an_empty_table() -> None:
    assert score_table([]).rows == ()
