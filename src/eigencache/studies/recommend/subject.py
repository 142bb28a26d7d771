"""Read the subject of a recommendation: a model's name, or the JSON record of a probe, a report or a sweep."""

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
_USE = "Use a file written by `probe --output`, `report` or `sweep --output`."


def read_subject(spec: str, model: str | None = None) -> Subject:
    """Return the record of a `.json` file, or `spec` itself as a model's name.

    Args:
        spec: Path of a JSON record, or a model specification.
        model: Model to use if a report contains several. Default: the only one.

    Raises:
        RecordError: The file is not a record of a probe, report or sweep, or it does not contain `model`.
    """
    path = Path(spec).expanduser()
    if path.suffix != ".json" or path.is_dir():
        if model is not None:
            raise RecordError(f"`model` {model}: selects a model of a report, but {spec} is not a report. Omit `model`.")
        return spec
    record = _KNOWN[_schema(path)].load(path)
    if isinstance(record, ReportRecord):
        return _of_report(record, path, model)
    if model is not None and record.model.name != model:
        raise RecordError(f"`model` {model}: {path} contains only {record.model.name}. Omit `model`.")
    return record


def _schema(path: Path) -> str:
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise RecordError(f"{path}: cannot be read ({error.strerror}): check the path") from error
    except ValueError as error:
        raise RecordError(f"{path}: not JSON: {error}. {_USE}") from error
    schema = content.get("schema_version") if isinstance(content, dict) else None
    if schema not in _KNOWN:
        problem = f"a record of type {schema}" if isinstance(schema, str) else "not a record"
        raise RecordError(f"{path}: is {problem}. {_USE}")
    return schema


def _of_report(record: ReportRecord, path: Path, model: str | None) -> ProbeRecord:
    names = [probe.model.name for probe in record.probes]
    if model is None and len(names) == 1:
        return record.probes[0]
    if model not in names:
        problem = "" if model is None else f"`model` {model}: not in this report. "
        raise RecordError(f"{problem}{path} contains {len(names)} models. Choose one with `model`: {', '.join(names)}")
    return record.probes[names.index(model)]


def check_same_model(loaded: LoadedModel, record: ProbeRecord, path: str) -> None:
    """Raise `ModelError` if the weights or the configuration of a model differ from those of a probe.

    Args:
        loaded: The model.
        record: Record of the probe.
        path: File of the record, named in the error.
    """
    current = loaded.sha256
    if current != record.model.sha256:
        raise ModelError(
            f"{path}: made with other weights or another configuration of {record.model.name} "
            f"({record.model.sha256[:12]}, now {current[:12]}). To continue, probe the model again."
        )
