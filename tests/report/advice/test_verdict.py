"""A verdict names the targets that are compressible within the budget, or why nothing was measured."""

from statistics import fmean

import pytest

from eigencache.records.advice import Advice, Budget, ReportRecord, Verdict
from eigencache.records.probe import ProbeRecord
from eigencache.report.advice.verdict import loss_figure, short_table, shown
from eigencache.report.html import page
from eigencache.studies.recommend.recommend import recommend_sweep
from planted_sweeps import series, sweep

BUDGET = Budget.of_ppl("1%")
RECORD = sweep(
    series("v", (8, 1.8, 0.004, 0.002), (4, 2.5, 0.004, 0.02)),
    series("k", (4, 1.9, 0.2, 0.01), frame="post"),
    series("kv", (12, 6.0, 0.003, 0.004), (6, 9.0, 0.05, 0.01)),
)


@pytest.fixture
def advice() -> Advice:
    return recommend_sweep(RECORD, BUDGET, "planted-model")


def ranks_of(record: ProbeRecord) -> list[str]:
    """Mean over layers of the rank of 90 % of the energy, keys before rotation and values, as tables write it."""
    means = [fmean(s.rank_90 for s in record.select(name, "layer")) for name in ("keys_pre_rope", "values")]
    return [f"{mean:.1f}".removesuffix(".0") for mean in means]


def test_one_row_says_low_rank_compressible_and_to_do(gqa, advice: Advice) -> None:
    table = short_table(ReportRecord(probes=[gqa], verdicts=[Verdict(advice=advice)]), ["a"])
    ((name, low_rank, v, k, kv, what, ratio, loss),) = table.rows
    assert (name, v, k, kv, ratio) == ("a", "1.80", "—", "6.00", "6.00")
    widths = [f"{w} {n} of 64 per layer" for w, n in zip("KV", ranks_of(gqa), strict=True)]
    assert low_rank.split("\n")[0] == widths[0]
    assert low_rank.split("\n")[1].startswith(f"{widths[1]}, ")
    assert low_rank.endswith(" of 128 over all layers")
    assert what.startswith("compress K before rotation and V")
    assert loss == "0.0030 [-0.0010, 0.0070]"
    assert "0.00995 nats" in table.notes[0]


def test_nothing_within_the_budget_is_said(gqa) -> None:
    advice = recommend_sweep(sweep(series("v", (8, 1.8, 0.2, 0.01))), BUDGET, "planted-model")
    ((*_, what, ratio, loss),) = short_table(ReportRecord(probes=[gqa], verdicts=[Verdict(advice=advice)]), ["a"]).rows
    assert (what, ratio, loss) == ("nothing within the budget: keep 16 bits", "—", "—")


def test_a_model_that_was_not_judged_has_its_reason_on_the_page(gqa, mha, advice: Advice) -> None:
    verdicts = [Verdict(advice=advice), Verdict(reason="layer 0 keeps a <state>")]
    report = ReportRecord(probes=[gqa, mha], verdicts=verdicts)
    assert short_table(report, ["a", "b"]).rows[1][2:] == ("—", "—", "—", "not measured", "—", "—")
    html = page(report)
    assert "Compression was not measured: layer 0 keeps a &lt;state&gt;" in html
    assert html.count("Recommendation</h3>") == 1
    assert html.count('data-figure="rope-gqa-loss"') == 1


def test_without_verdicts_there_is_no_summary(gqa) -> None:
    assert short_table(ReportRecord(probes=[gqa]), ["a"]) is None
    assert "Recommendation</h3>" not in page(ReportRecord(probes=[gqa]))


def test_the_figure_draws_perplexity_against_bytes_with_its_intervals() -> None:
    figure = loss_figure(RECORD)
    values, keys, both = figure.traces
    assert values["x"] == pytest.approx([1.8, 2.5], rel=1e-4)
    assert values["y"] == pytest.approx([0.4008, 0.4008], rel=1e-3)
    assert values["error_y"]["array"] == pytest.approx([0.2010, 2.0281], rel=1e-3)
    assert [trace["tone"] for trace in (values, keys, both)] == ["values", "keys_post_rope", "kv"]


def test_every_part_of_the_advice_is_shown(advice: Advice) -> None:
    parts = shown(Verdict(advice=advice))
    assert parts.lines[0].startswith("planted-model: compress")
    titles = [table.title for table in (*parts.compressible, *parts.advice)]
    for title in ("largest ratio within a perplexity increase", "loss by rank", "evidence", "limitations"):
        assert any(title in one for one in titles), titles
