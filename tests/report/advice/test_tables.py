"""A recommendation is printed as sentences and tables, with its held-out loss; or that no setting meets the budget."""

import io

import pytest
from rich.console import Console

import planted_sweeps as planted
from eigencache.records.advice import Advice, Budget, KeyBias, KeyRounding, Keys
from eigencache.report.advice.tables import advice_lines, advice_tables, evidence_lines, evidence_tables
from eigencache.studies.recommend.recommend import recommend_sweep
from planted_sweeps import series, sweep

BUDGET = Budget.of_ppl("1%")


@pytest.fixture
def from_sweep() -> Advice:
    record = sweep(series("v", (8, 1.8, 0.004, 0.002)), series("kv", (12, 6.0, 0.003, 0.004), (32, 4.0, 0.0, 0.001)))
    return recommend_sweep(record, BUDGET, "sweep.json")


def stated(advice: Advice, delta: float, half: float | None) -> Advice:
    """As if it had been measured: with the loss of the chosen way on another half."""
    assert advice.chosen
    quality = planted.quality(advice.chosen.name, 6.0, delta, half)
    chosen = advice.chosen.model_copy(update={"stating": quality})
    return advice.model_copy(update={"chosen": chosen, "stating": planted.CORPUS})


def test_the_first_lines_say_what_to_do_at_which_bytes_and_loss(from_sweep: Advice) -> None:
    what, nbytes, loss, command = advice_lines(from_sweep)
    assert what.startswith(
        "planted-model: compress K before rotation and V, one basis per head, metric fisher, rank 12 of 32"
    )
    assert "--budget-ppl 1%, 0.00995 nats per token" in what
    assert nbytes == "Bytes: 256 → 42.7 per token, ratio 6.00; basis 6,400 bytes, break-even context 31 tokens."
    assert loss == (
        "Loss, on the tokens that the choice used: ΔNLL 0.0030 [-0.0010, 0.0070] nats per token, +0.30 % perplexity, "
        "KL 0.0030."
    )
    assert command.startswith("Command: eigencache evaluate planted-model --target kv --scope head --frame pre")


@pytest.mark.parametrize(
    ("half", "says"),
    [
        (0.002, "the interval is within the budget."),
        (0.009, "the interval exceeds the budget."),
        (None, "too few sequences for an interval."),
    ],
)
def test_whether_the_choice_held_where_it_was_not_made_is_said(from_sweep: Advice, half: float | None, says: str) -> None:
    (*_, loss, _) = advice_lines(stated(from_sweep, 0.005, half))
    assert loss.startswith("Loss, on held-out sequences that the choice did not use: ΔNLL 0.0050")
    assert loss.endswith(says)


def test_that_nothing_qualifies_is_said_with_the_nearest() -> None:
    advice = recommend_sweep(sweep(series("v", (8, 1.8, 0.2, 0.01))), BUDGET, "sweep.json")
    none, closest = advice_lines(advice)
    assert "no measured setting meets the budget" in none
    assert closest.startswith("Nearest: V, one basis per head, metric fisher, rank 8 of 32 in 8 bits, ΔNLL 0.2000")
    assert "no PCA setting within the budget" in advice_tables(advice)[0].title


def test_a_sweep_without_intervals_decides_nothing_and_says_why() -> None:
    advice = recommend_sweep(sweep(series("v", (8, 1.8, 0.001, None))), BUDGET, "sweep.json")
    undecided, closest = advice_lines(advice)
    assert "undecided: 40 sequences are too few for an interval, and its upper end decides. Use more tokens (" in undecided
    assert closest.endswith("ΔNLL 0.0010.")
    (table,) = advice_tables(advice)
    assert table.title.endswith("nearest PCA setting, without an interval") and "Intervals" not in " ".join(table.notes)
    assert not any("intervals come from" in line for line in advice.unknown)


def test_full_rank_and_keys_after_rotation_are_named() -> None:
    record = sweep(series("k", (32, 1.5, 0.0, 0.001), frame="post", bits=4))
    (what, *_) = advice_lines(recommend_sweep(record, BUDGET, "sweep.json"))
    assert "compress K after rotation, one basis per head, metric fisher, full rank in 4 bits" in what


def test_the_table_has_the_best_of_every_target_with_both_losses(from_sweep: Advice) -> None:
    (ways,) = advice_tables(stated(from_sweep, 0.005, 0.002))
    first, second = (dict(zip(ways.columns, row, strict=True)) for row in ways.rows)
    assert (first["Ratio"], first["Ratio of target"], first["Rank"]) == ("6.00", "12.00", "12 of 32")
    assert (first["ΔNLL, choice"], first["ΔNLL, held-out"]) == ("0.0030 [-0.0010, 0.0070]", "0.0050 [0.0030, 0.0070]")
    assert (second["Setting"], second["ΔNLL, held-out"]) == ("v · head · fisher · centered", "—")
    assert first["Setting"] == "kv · head · pre-RoPE · fisher · centered"
    assert "which the choice did not use" in ways.notes[0]


def test_biased_keys_get_their_magnitudes_and_what_rounding_costs(from_sweep: Advice) -> None:
    bias = KeyBias(layer_idx=3, bias_norm=90.0, mean_key_norm=100.0, largest_to_median=float("inf"))
    roundings = [
        KeyRounding(kind=kind, mean_out=out, quality=planted.quality(f"K {kind}", 1.33, 0.01 if not out else 0.001, 0.002))
        for kind in ("fp8", "int8")
        for out in (False, True)
    ]
    advice = from_sweep.model_copy(update={"keys": Keys(biases=[bias], roundings=roundings)})
    _, sizes, rounded = advice_tables(advice)
    assert sizes.rows == (("3", "90.00", "100.00", "90 %", "∞"),)
    assert [row[1] for row in rounded.rows] == ["kept", "subtracted", "kept", "subtracted"]
    assert rounded.rows[1][3] == "0.0010 [-0.0010, 0.0030]"


def test_the_evidence_has_claim_figure_and_source_and_the_unknown_is_listed(from_sweep: Advice) -> None:
    lines, (evidence, unknown) = evidence_lines(from_sweep), evidence_tables(from_sweep)
    assert all(all(cell for cell in row) for row in evidence.rows)
    assert [row[0] for row in unknown.rows] == from_sweep.unknown
    assert len(lines) == 2 + len(evidence.rows) + len(unknown.rows)
    assert f"• {evidence.rows[1][0]}: {evidence.rows[1][1]} ({evidence.rows[1][2]})" in lines


def test_everything_prints(from_sweep: Advice) -> None:
    page = io.StringIO()
    for table in (*advice_tables(from_sweep), *evidence_tables(from_sweep)):
        Console(file=page, width=100).print(table)
        assert "<table>" in table.html()
        assert table.title in table.markdown()
    assert "planted-model" in page.getvalue()
