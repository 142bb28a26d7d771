"""Timings are read in both spellings of their schema, with the repeats that older files do not record."""

import json
from pathlib import Path

import pytest

from eigencache.errors import RecordError
from eigencache.records.speed import SpeedRecord

PUBLISHED = Path(__file__).parents[2] / "docs" / "performance" / "speed.json"


def test_the_published_timings_are_read(tmp_path: Path) -> None:
    record = SpeedRecord.load(PUBLISHED)
    assert record.schema_version == "eigencache.speed/1" and record.timings
    assert (record.generation_rounds, record.prefill_repeats) == (5, min(5, record.repeats))
    record.save(tmp_path / "speed.json")
    assert SpeedRecord.load(tmp_path / "speed.json") == record


def test_both_spellings_of_the_schema_are_the_same_record_and_others_are_refused(tmp_path: Path) -> None:
    data = json.loads(PUBLISHED.read_text())
    for schema in ("eigencache-speed/1", "eigencache.speed/1"):
        assert SpeedRecord.model_validate(data | {"schema_version": schema}).schema_version == "eigencache.speed/1"
    (tmp_path / "other.json").write_text(json.dumps(data | {"schema_version": "eigencache.speed/2"}))
    with pytest.raises(RecordError, match=r"should be 'eigencache\.speed/1'"):
        SpeedRecord.load(tmp_path / "other.json")


def test_recorded_repeats_are_kept() -> None:
    data = json.loads(PUBLISHED.read_text()) | {"prefill_repeats": 2, "generation_rounds": 9}
    record = SpeedRecord.model_validate(data)
    assert (record.prefill_repeats, record.generation_rounds) == (2, 9)
