"""Tables at equal KL: every cell computed by hand."""

from eigencache.records.bench import BenchPoint
from eigencache.report.bench.equal_divergence import against_by_divergence_table, divergences_table
from eigencache.report.core.measured import ABSENT
from planted_benches import bench, equal, planted, point


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


def test_methods_that_do_not_support_the_model_have_dashes_as_at_equal_loss() -> None:
    table = divergences_table(planted(refused={"xquant": "keys are narrow"}), 384)
    assert [row[0] for row in table.rows][-1] == "xquant"
    assert set(table.rows[-1][1:]) == {ABSENT} and not any("inf" in cell for row in table.rows for cell in row)


def test_intervals_end_where_the_ends_of_the_points_intervals_cross() -> None:
    made = [point("eigen", f"{bits}", bits, 0.0) for bits in (0.25, 0.5, 1.0, 2.0, 4.0)]
    points = [  # KL = 0.03 / bits^2, its interval from half to twice as much
        p.model_copy(update={"quality": p.quality.model_copy(update={"kl": kl, "kl_interval": (kl / 2, 2 * kl)})})
        for p, kl in zip(made, (0.48, 0.12, 0.03, 0.0075, 0.001875), strict=True)
    ]
    record = bench(points, [equal("eigen", 0.03, 0.5)])
    cells = divergences_table(record, 384).rows[0]
    assert cells[1:5] == ("3.16", "1.73 [1.22, 2.45]", "1 [0.707, 1.41]", "0.548 [0.387, 0.775]")
    incomplete = [points[0].model_copy(update={"quality": points[0].quality.model_copy(update={"kl_interval": None})})]
    assert divergences_table(bench([*incomplete, *points[1:]], record.equal_loss), 384).rows[0][3] == "1"
