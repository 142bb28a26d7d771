"""A rate that misses its loss says at which end of the curve; records of earlier versions get that from their points."""

import json
from pathlib import Path

import pytest

from eigencache.records.bench import BenchPoint, BenchRecord, EqualLoss
from planted_sweeps import quality

LEADERBOARD = Path(__file__).parents[2] / "docs" / "leaderboard" / "bundled"


def point(bits: float, delta: float, seed: int = 0, method: str = "m") -> BenchPoint:
    measured = quality("m", 16 / bits, delta, 0.002)
    return BenchPoint(method=method, point=f"{bits}", seed=seed, context=384, quality=measured, excess=[delta])


def rate(by_seed: list[float | None], **fields) -> EqualLoss:
    values = {"method": "m", "context": 384, "delta_nll": 0.03, "bits_per_value": None, "interval": None}
    return EqualLoss(**(values | {"by_seed": by_seed} | fields))


@pytest.mark.parametrize(
    ("points", "end", "bits"),
    [
        ([point(1, 0.2), point(8, 0.1)], "most", 8),
        ([point(1, 0.02), point(8, 0.01)], "fewest", 1),
        ([point(1, 0.2), point(2, 0.02, 1), point(8, 0.01, 2)], "fewest", 1),  # two of three seeds
        ([point(1, 0.2), point(2, 0.02, 1)], "most", 2),  # one of two seeds is not most of them
        ([point(1, 0.2, method="other")], None, None),
    ],
)
def test_the_end_is_that_of_most_seeds(points: list[BenchPoint], end: str | None, bits: float | None) -> None:
    filled = rate([None]).with_end(points)
    assert (filled.end, filled.end_bits) == (end, pytest.approx(bits) if bits else None)


def test_a_rate_that_is_known_or_recorded_is_kept() -> None:
    points = [point(1, 0.2), point(8, 0.1)]
    for kept in (rate([2.0]), rate([None, 1.25, 1.59]), rate([None], end="fewest", end_bits=0.5)):
        assert kept.with_end(points) == kept


def test_a_sentence_decides_nothing() -> None:
    points = [point(1, 0.2), point(8, 0.1)]
    for why in ("", "loses 0.1 at its fewest, 3 bits"):
        assert rate([None], why=why).with_end(points).end == "most"


def test_a_rate_is_bounded_by_its_median_or_by_the_lowest_rate_that_suffices() -> None:
    assert rate([2.0]).at_most_bits == 2.0
    assert rate([None], end="fewest", end_bits=0.5).at_most_bits == 0.5
    assert rate([None], end="most", end_bits=8.0).at_most_bits == rate([None]).at_most_bits == float("inf")


@pytest.mark.parametrize("name", ["ref-gpt2", "ref-deepseek"])
def test_published_records_are_read_with_their_ends(name: str, tmp_path: Path) -> None:
    path = LEADERBOARD / f"{name}.json"
    record = BenchRecord.load(path)
    missing = [r for r in record.equal_loss if r.median_bits is None]
    assert missing and all(r.end and r.end_bits for r in missing)
    stored = json.loads(path.read_text())["equal_loss"]
    for filled, before in zip(record.equal_loss, stored, strict=True):
        after = json.loads(filled.model_dump_json())
        assert {key: after[key] for key in before} == before
    record.save(tmp_path / "again.json")
    assert BenchRecord.load(tmp_path / "again.json") == record
