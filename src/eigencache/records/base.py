"""Base of all records: what is written to JSON is read back equal, and a damaged file is refused by name."""

import os
import tempfile
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, ValidationError

from eigencache.errors import OutputError, RecordError

Scope = Literal["head", "layer", "all"]


SCOPES: tuple[Scope, ...] = ("head", "layer", "all")


Interval = tuple[float, float]
Centered = Annotated[bool, Field(validation_alias=AliasChoices("centered", "centred"))]  # read in either spelling


class Record(BaseModel):
    """Base of all records: unknown fields are refused, infinities survive JSON."""

    model_config = ConfigDict(extra="forbid", ser_json_inf_nan="strings", val_json_bytes="utf8")


class StoredRecord(Record):
    """A record that is a file of its own: it names its schema, and is read back equal or refused."""

    def save(self, path: str | Path) -> None:
        """Write as JSON; the file appears whole or not at all."""
        write_whole(path, self.model_dump_json(indent=1).encode())

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read back what `save` wrote. Raises `RecordError`, naming the file and the first field at fault."""
        path = Path(path)
        schema = cls.model_fields["schema_version"].default
        try:
            return cls.model_validate_json(path.read_bytes())
        except OSError as error:
            raise RecordError(f"{path}: cannot be read ({error.strerror})") from error
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or "the file"
            raise RecordError(f"{path}: not a record of schema {schema}: {where}: {first['msg']}") from error


def write_whole(path: str | Path, data: bytes) -> None:
    """Write a file completely or not at all, also when interrupted. Raises `OutputError`."""
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
            Path(temporary).chmod(0o644)
            Path(temporary).replace(path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise OutputError(f"{path}: cannot be written ({error.strerror}): choose another output") from error
