"""The table of all operating points."""

from eigencache.report.bench.points import points_table
from planted_benches import planted


def test_every_point_is_listed_with_its_basis() -> None:
    record = planted(contexts=(384, 1920))
    table = points_table(record, 1920)
    assert len(table.rows) == len(record.points) // 2
    row = next(row for row in table.rows if row[:3] == ("kvtc", "1", "1"))
    assert row[3:] == ("1.600", "10.00", "0.0500 [0.0480, 0.0520]", "0.0500", "99.0 %", "0.01", "28")
