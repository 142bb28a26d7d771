"""Progress without a terminal: a line per piece of work, and its counts from time to time."""

import pytest

import eigencache.cli.progress
from eigencache.cli.progress import progress_bar


@pytest.mark.parametrize(
    ("seconds", "lines"), [(1e9, ["m: scoring"]), (0, ["m: scoring", "m: scoring, 1 of 1,200", "m: scoring, 2 of 1,200"])]
)
def test_counts_are_printed_no_more_often_than_asked(
    seconds: float, lines: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(eigencache.cli.progress, "SECONDS", seconds)
    with progress_bar("m") as on_progress:
        for done in range(3):
            on_progress("scoring", done, 1200)
    assert capsys.readouterr().err.splitlines() == lines
