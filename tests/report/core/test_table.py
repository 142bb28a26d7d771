"""A table fits the terminal: words are folded, the least important columns are hidden and named; pages have all columns."""

import io

import pytest
from rich.console import Console

from eigencache.report.core.table import Table

COLUMNS = ("Method", "Point", *(f"Number {i}" for i in range(12)), "Reason")
ROWS = tuple(
    (f"method-{i}", f"{i} bits", *(f"{1000 * i + j}.125" for j in range(12)), "a reason in words") for i in range(3)
)
TABLE = Table("a wide table", COLUMNS, ROWS, notes=("a note",), words=frozenset({"Point", "Reason"}), identity=2)


def text_of(table: Table, width: int) -> str:
    page = io.StringIO()
    Console(file=page, width=width).print(table)
    return page.getvalue()


@pytest.mark.parametrize("width", [30, 40, 80, 120, 300])
def test_no_line_is_wider_than_the_terminal_and_rows_keep_their_identity(width: int) -> None:
    text = text_of(TABLE, width)
    assert max(map(len, text.splitlines())) <= width
    for row in ROWS:
        assert text.count(row[0]) == 1 and row[1] in text and "…" not in text


def test_columns_are_hidden_from_the_right_and_named() -> None:
    text = " ".join(text_of(TABLE, 80).split())
    assert "Number 0" not in text.split("hidden at")[1] and "1000.125" in text
    assert "7 columns hidden at 80 characters: Number 6; Number 7; " in text and "Number 11 and 1 more." in text
    needed = int(text.split("COLUMNS=")[1].rstrip("."))
    assert "hidden" not in text_of(TABLE, needed) and "hidden" in text_of(TABLE, needed - 1)


def test_columns_to_hide_first_are_hidden_first() -> None:
    table = Table("t", COLUMNS, ROWS, words=TABLE.words, identity=2, hidden_first=("Number 0", "Number 1"))
    (note,) = text_of(table, 130).split("hidden at 130 characters: ")[1:]
    assert note.startswith("Number 0; Number 1")


def test_one_number_is_shown_however_narrow_the_terminal() -> None:
    assert "1000.125" in text_of(TABLE, 30)


def test_pages_have_all_columns() -> None:
    for column in COLUMNS:
        assert column in TABLE.markdown() and column in TABLE.html()
    assert "hidden" not in TABLE.markdown() + TABLE.html()


def test_words_are_folded_before_columns_are_hidden_and_spread_out_where_there_is_room() -> None:
    table = Table("t", ("A", "B", "C"), (("a", "word " * 12, "1"),), words=frozenset({"B"}))
    assert "hidden" not in text_of(table, 40) and text_of(table, 40).count("\n") > text_of(table, 120).count("\n")
    assert ("word " * 12).strip() in text_of(table, 120)
