"""What advice is asked about: a model by its name, or the JSON of a probe, a report or a sweep of one."""

import json
from pathlib import Path

from eigencache.errors import ModelError, RecordError
from eigencache.models.load import LoadedModel
from eigencache.records.advice import ReportRecord
from eigencache.records.probe import ProbeRecord
from eigencache.records.quality import SweepRecord

Subject = str | ProbeRecord | SweepRecord
_KNOWN = {
    "eigencache.probe/1": ProbeRecord,
    "eigencache.report/1": ReportRecord,
    "eigencache.sweep/1": SweepRecord,
}


def read_subject(spec: str, model: str | None = None) -> Subject:
    """A `.json` file is a record, all else a model; `model`: which one of a report with several.

    Raises `RecordError` for a file that is none of the three records, and for a report without the model.
    """
    path = Path(spec).expanduser()
    if path.suffix != ".json" or path.is_dir():
        if model is not None:
            raise RecordError(f"`model` {model}: chooses among the models of a report; {spec} is no report")
        return spec
    record = _KNOWN[_schema(path)].load(path)
    if isinstance(record, ReportRecord):
        return _of_report(record, path, model)
    if model is not None and record.model.name != model:
        raise RecordError(f"`model` {model}: {path} is of {record.model.name}")
    return record


def _schema(path: Path) -> str:
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise RecordError(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise RecordError(f"{path}: not JSON: {error}") from error
    schema = content.get("schema_version") if isinstance(content, dict) else None
    if schema not in _KNOWN:
        found = f"a record of {schema}" if isinstance(schema, str) else "no record"
        raise RecordError(
            f"{path}: is {found}; advice is given on what `probe --output`, `report` or `sweep --output` wrote"
        )
    return schema


def _of_report(record: ReportRecord, path: Path, model: str | None) -> ProbeRecord:
    names = [probe.model.name for probe in record.probes]
    if model is None and len(names) == 1:
        return record.probes[0]
    if model not in names:
        asked = "" if model is None else f"`model` {model}: "
        raise RecordError(f"{asked}{path} is of {len(names)} models: choose one with `model`: {', '.join(names)}")
    return record.probes[names.index(model)]


def check_same_model(loaded: LoadedModel, record: ProbeRecord, path: str) -> None:
    """Raises `ModelError` where the weights or the configuration are not those that were probed."""
    found = loaded.sha256
    if found != record.model.sha256:
        raise ModelError(
            f"{path}: was made with other weights or another configuration of {record.model.name} "
            f"({record.model.sha256[:12]}, now {found[:12]}): probe the model again"
        )
