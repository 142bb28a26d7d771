"""The view of attention sinks: ranges over heads, the reasons of missing numbers, and the same shares in every figure."""

import io

import numpy as np
import pytest
from rich.console import Console

from eigencache.records.advice import ReportRecord
from eigencache.records.probe import LayerSinks, ProbeRecord, SinkStatistics
from eigencache.report.core.drawing import save_figure
from eigencache.report.core.measured import ABSENT
from eigencache.report.html import page
from eigencache.report.probe.interactive import sinks_figure
from eigencache.report.probe.sinks import plot_sinks, sinks_sentence, sinks_table
from eigencache.report.probe.summary import probe_summary


def shown(record: ProbeRecord, width: int) -> str:
    terminal = io.StringIO()
    Console(file=terminal, width=width).print(sinks_table(record))
    return terminal.getvalue()


def changed(record: ProbeRecord, **changes: object) -> ProbeRecord:
    assert record.sinks is not None
    return record.model_copy(update={"sinks": record.sinks.model_copy(update=changes)})


def test_a_row_has_the_range_over_heads_of_every_statistic(gqa) -> None:
    table = sinks_table(gqa)
    assert table.columns == (
        "Layer",
        "First token",
        "First four",
        "Largest other",
        "First K norm",
        "First V norm",
        "Largest K norm",
        "Largest V norm",
        "K gradient",
        "V gradient",
    )
    assert table.rows[0] == (
        "0", "0.40–0.50", "0.45–0.55", "0.020 @ 91", "0.25–0.30", "0.25–0.30", "20.0 @ 37", "1.5 @ 38", "0.75", "0.88"
    )  # fmt: skip
    assert table.rows[1][1] == "0.45–0.55" and len(table.rows) == 2
    assert "A fit in the Fisher metric stores the first 4 tokens exactly." in table.notes
    assert "1,024 tokens in 8 sequences" in table.title


@pytest.mark.parametrize("width", [60, 80, 160])
def test_the_table_fits_the_terminal(gqa, width: int) -> None:
    text = shown(gqa, width)
    assert max(map(len, text.splitlines())) <= width and "0.40–0.50" in text


def test_without_gradients_their_columns_are_left_out(gqa) -> None:
    layers = []
    for layer in gqa.sinks.layers:
        slots = [slot.model_copy(update={"gradient_energy": None, "gradient_share": None}) for slot in layer.slots]
        layers.append(layer.model_copy(update={"slots": slots}))
    table = sinks_table(changed(gqa, layers=layers, exact_tokens=None))
    assert table.columns[-1] == "Largest V norm" and "Gradient" not in " ".join(table.notes)


def test_attention_that_was_not_measured_is_a_dash_with_a_reason(gqa) -> None:
    first, second = gqa.sinks.layers
    silent = LayerSinks(layer_idx=0, slots=first.slots)
    alone = second.model_copy(update={"other_position": [-1, -1]})
    record = changed(gqa, layers=[silent, alone], reasons=["layers 0: planted reason"])
    table = sinks_table(record)
    assert table.rows[0][1:4] == (ABSENT,) * 3 and table.rows[0][4] == "0.25–0.30" and table.rows[1][3] == ABSENT
    assert "planted reason" in shown(record, 100)
    assert sinks_figure(record).traces[0]["y"] == ["layer 1"]
    assert sinks_sentence(record).startswith("Attention on the first token: 50% (")


def test_the_sentence_is_the_median_and_the_range_over_layers(gqa, mha) -> None:
    first, four = ([np.mean(x) for x in shares] for shares in (((0.4, 0.5), (0.45, 0.55)), ((0.45, 0.55), (0.5, 0.6))))
    sentence = f"Attention on the first token: {np.median(first):.0%} (median of the layers; 45%–50%), on the first four: "
    assert sinks_sentence(gqa) == f"{sentence}{np.median(four):.0%}."
    assert probe_summary(gqa).notes[-1] == sinks_sentence(gqa)
    assert sinks_sentence(mha) == "" and len(probe_summary(mha).notes) == 1


def test_records_of_earlier_versions_say_so_and_have_no_figure(mha) -> None:
    assert mha.sinks is None and sinks_figure(mha) is None and "earlier version" in shown(mha, 80)
    assert "attention sinks" not in page(ReportRecord(probes=[mha])).split('id="method"')[0]


def test_figures_hold_the_shares_by_layer_and_head(gqa, tmp_path) -> None:
    figure = sinks_figure(gqa)
    np.testing.assert_allclose(figure.traces[0]["z"], [[0.4, 0.5], [0.45, 0.55]])
    assert (figure.traces[0]["x"], figure.traces[0]["y"]) == (["head 0", "head 1"], ["layer 0", "layer 1"])
    drawn = plot_sinks(gqa)
    np.testing.assert_allclose(drawn.axes[0].images[0].get_array(), [[0.4, 0.45], [0.5, 0.55]])
    save_figure(drawn, tmp_path / "sinks.png")
    assert (tmp_path / "sinks.png").read_bytes().startswith(b"\x89PNG")


def test_a_plot_without_attention_says_so(mha) -> None:
    (text,) = plot_sinks(mha).axes[0].texts
    assert "not measured" in text.get_text()


def test_the_page_has_the_heat_map_the_sentence_and_the_table(gqa) -> None:
    html = page(ReportRecord(probes=[gqa]))
    assert "Attention on the first token" in html and sinks_sentence(gqa) in html and "0.40–0.50" in html


def test_a_model_with_a_single_head_and_zero_norms_is_shown(gqa) -> None:
    layer = gqa.sinks.layers[0]
    slot = layer.slots[0].model_copy(update={"median_norm": [0.0, 0.0]})
    record = changed(gqa, layers=[layer.model_copy(update={"slots": [slot], "first_share": [1.0]})])
    assert sinks_table(record).rows[0][1] == "1.00" and "inf" in sinks_table(record).rows[0][4]


def test_a_record_with_sinks_survives_json(gqa) -> None:
    assert ProbeRecord.model_validate_json(gqa.model_dump_json()).sinks == gqa.sinks
    old = gqa.model_dump(exclude={"sinks"})
    assert ProbeRecord.model_validate(old).sinks is None
    assert SinkStatistics(sequences=1, tokens=9, layers=[]).reasons == []
