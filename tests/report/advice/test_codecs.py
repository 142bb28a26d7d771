"""A recommendation names the codec for each use, with its bytes, its loss and its command."""

import io

import pytest
from rich.console import Console

import planted_sweeps as planted
from eigencache.records.advice import Advice, Budget, CodecAdvice, ReportRecord, Verdict
from eigencache.report.advice.codecs import codec_table
from eigencache.report.advice.tables import advice_lines, advice_tables, evidence_lines
from eigencache.report.advice.verdict import short_table, shown
from eigencache.report.html import page
from eigencache.studies.recommend.commands import Recipe
from eigencache.studies.recommend.pca import PCAResult
from eigencache.studies.recommend.recommend import assembled, chosen_in
from planted_codecs import NATS, candidate, codecs
from planted_sweeps import series, sweep

BUDGET = Budget(nats=NATS, given="--budget-nll 0.01")
STORED = codecs("eigen", (0.25, 20.0, 0.009, 0.002), (0.5, 14.0, 0.004, 0.003), (1, 8.0, 0.001, 0.001))
LIVE = codecs("live", (2, 5.0, 0.05, 0.01), (4, 3.0, 0.02, 0.01))


def advised(*found: CodecAdvice, pca: PCAResult | None = None) -> Advice:
    record = sweep(series("kv", (12, 6.0, 0.003, 0.004)))
    return assembled(
        chosen_in(record, BUDGET) if pca is None else pca,
        found,
        Recipe.of_sweep(record),
        None,
        subject="planted-model",
        model=planted.model(),
        budget=BUDGET,
        protocol=planted.PROTOCOL,
        calibration=planted.CORPUS,
        choosing=planted.CORPUS,
        stating=None,
        run=planted.RUN,
        warnings=[],
    )


def stated(delta: float, half: float) -> Advice:
    """As if the chosen stored codec had been measured on another half."""
    chosen = STORED.chosen.model_copy(update={"stating": planted.quality("eigen", 14.0, delta, half)})  # type: ignore[union-attr]
    found = STORED.model_copy(update={"chosen": chosen, "candidates": [STORED.candidates[0], chosen, STORED.candidates[2]]})
    return advised(found).model_copy(update={"stating": planted.CORPUS})


def test_the_largest_ratio_whose_interval_is_within_the_budget_is_chosen_for_each_use() -> None:
    assert STORED.chosen == candidate("eigen", 0.5, 14.0, 0.004, 0.003)  # 0.25 is within by its estimate only
    assert LIVE.chosen is None and LIVE.nearest == candidate("live", 4, 3.0, 0.02, 0.01)


def test_the_lines_name_the_codec_its_bytes_loss_and_command_by_use() -> None:
    headline, use, nbytes, loss, command, live, pca, *_ = advice_lines(advised(STORED, LIVE))
    assert headline.startswith("planted-model: one recommendation for each use (budget --budget-nll 0.01")
    assert use == "Stored caches (on disk or in memory, decoded before use): eigen, 0.5 bits per value."
    assert nbytes == (
        "Bytes at 2,048 tokens: 256 → 9.1 per token, ratio 28.00 (14.00 as scored); side information 9,000 bytes, "
        "break-even context 77 tokens."
    )
    assert "ΔNLL 0.0040 [0.0010, 0.0070]" in loss and "KL 0.0014 [0.0007, 0.0021]" in loss
    assert command == "Command: eigencache fit planted-model --bits 0.5 -o planted-model-eigen"
    assert live.startswith(
        "Generation (the cache that the model attends to): no rate is within the budget. Nearest: live, 4"
    )
    assert pca.startswith("Research (PCA, low rank): compress K before rotation and V")


@pytest.mark.parametrize(("half", "says"), [(0.002, "is within the budget"), (0.02, "exceeds the budget")])
def test_whether_the_choice_held_where_it_was_not_made_is_said(half: float, says: str) -> None:
    advice = stated(0.005, half)
    assert any(
        line.startswith("Loss, on held-out") and line.endswith(f"the interval {says}.") for line in advice_lines(advice)
    )


def test_the_table_has_every_rate_and_marks_the_recommended_one() -> None:
    table = codec_table(stated(0.005, 0.002))
    rows = [dict(zip(table.columns, row, strict=True)) for row in table.rows]
    assert [row["Recommended"] for row in rows] == ["", "yes", ""]
    assert (rows[1]["Ratio"], rows[1]["Ratio at 2,048"], rows[1]["Bytes per token"]) == ("14.00", "28.00", "9.1")
    assert (rows[1]["ΔNLL, held-out"], rows[0]["ΔNLL, held-out"]) == ("0.0050 [0.0030, 0.0070]", "—")


def test_a_terminal_of_80_columns_shows_the_loss_beside_the_ratio() -> None:
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(codec_table(stated(0.005, 0.002)))
    heading = console.export_text().splitlines()[1:3]
    assert "Ratio" in " ".join(heading) and "ΔNLL" in " ".join(heading)


def test_evidence_shows_the_edge_and_limits_name_what_is_doubtful() -> None:
    advice = advised(codecs("eigen", (0.25, 20.0, 0.02, 0.002), (0.5, 1.5, 0.004, 0.003)), LIVE)
    claims = [line.claim for line in advice.evidence]
    assert "eigen, 0.25 bits per value: not within the budget" in claims
    assert "live: no rate is within the budget; the nearest is live, 4 bits per packed value" in claims
    assert "eigen, 0.5 bits per value: KL is 0.0133 nats, more than the budget" in "\n".join(advice.unknown)
    assert not any("lowest rate" in line for line in advice.unknown)
    lowest = advised(codecs("eigen", (0.5, 14.0, 0.004, 0.003)))
    assert "eigen, 0.5 bits per value: the lowest rate measured: lower rates may also qualify" in lowest.unknown


def test_a_family_that_was_refused_says_why_and_the_others_are_shown() -> None:
    refused = codecs("live", left_out=("live: a prefix of 20 tokens is too short",))
    advice = advised(STORED, refused, pca=PCAResult(refusal="175 independent vectors for 192 dimensions"))
    lines = advice_lines(advice)
    assert (
        "Generation (the cache that the model attends to): not measured. live: a prefix of 20 tokens is too short" in lines
    )
    assert lines[-1] == "Research (PCA, low rank): not measured. 175 independent vectors for 192 dimensions"
    assert "not measured: live: a prefix of 20 tokens is too short" in advice.unknown
    assert "not measured: PCA (175 independent vectors for 192 dimensions)" in advice.unknown
    assert [table.title for table in advice_tables(advice)] == ["planted-model: codecs by use"]
    assert evidence_lines(advice)


def test_a_report_has_the_codecs_of_every_model_in_its_summary(gqa, mha) -> None:
    without = advised(STORED, codecs("live", left_out=("live: no",)), pca=PCAResult(refusal="too few"))
    report = ReportRecord(probes=[gqa, mha], verdicts=[Verdict(advice=advised(STORED, LIVE)), Verdict(advice=without)])
    table = short_table(report, ["a", "b"])
    assert table
    first, second = (dict(zip(table.columns, row, strict=True)) for row in table.rows)
    assert first["To store"] == second["To store"] == "eigen, 0.5 bits per value: ratio 28.00 at 2,048 tokens"
    assert (first["To generate"], second["To generate"]) == ("nothing within the budget", "not measured")
    assert (first["Ratio"], second["PCA, for research"]) == ("6.00", "not measured")
    assert shown(report.verdicts[1]).figure is None
    html = page(report)
    assert html.count("Recommendation</h3>") == 2 and html.count("Compression ratio and loss</h3>") == 1
    assert "eigencache fit planted-model --bits 0.5 -o planted-model-eigen" in html
