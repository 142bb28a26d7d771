"""The summary of a probe fits one screen, and its cells are medians and ranges over layers."""

import io
from statistics import median

import pytest
from rich.console import Console

from eigencache.records.probe import ProbeRecord
from eigencache.report.core.measured import ABSENT
from eigencache.report.probe.summary import probe_summary
from planted_sinks import planted_sinks


def thirty_layers(record: ProbeRecord) -> ProbeRecord:
    """The record with its layers repeated until there are 30, each with other ranks, and twelve long warnings."""
    layers = [s for s in record.spectra if s.layer_idx is not None]
    count = len({s.layer_idx for s in layers})
    spectra = [
        s.model_copy(
            update={
                "layer_idx": s.layer_idx + count * i,
                "effective_rank": s.effective_rank and s.effective_rank * (1 + i / 10),
                "spread": s.spread * (1 + i),
                "support": s.support / (1 + i / 20),
            }
        )
        for i in range(-(-30 // count))
        for s in layers
    ]
    warnings = [f"warning {i}: a sentence that is longer than one line of a terminal of eighty columns" for i in range(12)]
    sinks = record.sinks and planted_sinks(30, 2)
    return record.model_copy(update={"spectra": spectra, "warnings": warnings, "sinks": sinks})


def lines(record: ProbeRecord, width: int = 80) -> list[str]:
    page = io.StringIO()
    Console(file=page, width=width).print(probe_summary(record))
    return page.getvalue().splitlines()


@pytest.mark.parametrize("name", ["gqa", "mha", "mla", "scarce"])
def test_thirty_layers_fit_a_screen_of_24_lines_and_80_columns(name: str, request) -> None:
    shown = lines(thirty_layers(request.getfixturevalue(name)))
    assert max(map(len, shown)) <= 80 and len(shown) <= 24
    text = "\n".join(shown)
    assert "30 layers" in text and "more: see all statistics by layer" in text and "hidden at" not in text
    assert text.count("warning 0") == 1 and "…" in text


@pytest.mark.parametrize("name", ["gqa", "mha", "mla", "scarce"])
@pytest.mark.parametrize(("every", "where"), [(1, "25 of 30 layers"), (5, "layers 5, 10, 15, 20, 25")])
def test_dead_dimensions_are_said_on_the_same_screen(name: str, every: int, where: str, request) -> None:
    record = thirty_layers(request.getfixturevalue(name))
    dead = {i: list(range(i % 7)) if i % every == 0 else [] for i in range(40)}
    spectra = [s.model_copy(update={"dead": dead[s.layer_idx]}) for s in record.spectra]
    shown = lines(record.model_copy(update={"spectra": spectra}))
    assert max(map(len, shown)) <= 80 and len(shown) <= 24
    text = "\n".join(shown)
    assert "0–6 dead" in text and "hidden at" not in text and "see all statistics by layer" in text
    assert f"Dead dimensions never vary and are not in Spread: {where}." in text
    assert "dead" not in "\n".join(lines(record)).lower()


def test_a_cell_is_the_median_and_below_it_the_range(gqa, edited) -> None:
    record = edited(gqa, "values", support=60.0)
    row = next(row for row in probe_summary(record).rows if row[0] == "values")
    ranks = [s.rank_95 for s in record.select("values", "layer")]
    low, high = min(ranks), max(ranks)
    assert row[2] == (f"{median(ranks):g}" if low == high else f"{median(ranks):g}\n{low}–{high}")
    assert row[1] == "64" and row[-1] == "60.0"
    energies = [s.held_out_energy[16] for s in record.select("values", "layer")]
    assert row[4].split("\n")[0] == f"{median(energies):.2f}"


def test_every_tensor_has_a_row_with_its_frame(gqa, mla) -> None:
    assert [row[0] for row in probe_summary(gqa).rows] == ["keys\nbefore RoPE", "keys\nas cached", "values"]
    labels = [row[0] for row in probe_summary(mla).rows]
    assert labels[:3] == ["latent", "rotary key\nbefore RoPE", "rotary key\nas cached"]
    assert labels[3:] == ["keys,\nexpanded", "values,\nexpanded"]


def test_withheld_and_doubtful_numbers_are_marked(gqa, edited, scarce) -> None:
    assert probe_summary(scarce).rows[0][2] == ABSENT
    row = next(row for row in probe_summary(edited(gqa, "values", support=5.0, rank_95=7)).rows if row[0] == "values")
    assert row[2] == "7!"


def test_layers_that_lack_a_number_are_counted(gqa) -> None:
    first = gqa.select("values", "layer", 0)[0]
    spectra = [s.model_copy(update={"rank_95": None}) if s is first else s for s in gqa.spectra]
    row = next(row for row in probe_summary(gqa.model_copy(update={"spectra": spectra})).rows if row[0] == "values")
    assert row[2].endswith("\n(1/2)")


def test_without_the_scope_layer_heads_or_all_layers_are_summarized(gqa) -> None:
    heads = gqa.model_copy(update={"spectra": gqa.select(scope="head")})
    assert "Median over layers and heads" in probe_summary(heads).notes[0] and len(probe_summary(heads).rows) == 3
    joined = gqa.model_copy(update={"spectra": gqa.select(scope="all")})
    assert [row[0] for row in probe_summary(joined).rows] == ["values"]
    assert probe_summary(gqa.model_copy(update={"spectra": []})).rows == ()
