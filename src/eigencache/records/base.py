"""The base of all records, which are read back from JSON as they were written, and writing of whole files."""

import os
import tempfile
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, ValidationError

from eigencache.errors import OutputError, RecordError

Scope = Literal["head", "layer", "all"]  # what one basis or spectrum is over
SCOPES: tuple[Scope, ...] = ("head", "layer", "all")
Interval = tuple[float, float]  # lower and upper end
Centered = Annotated[bool, Field(validation_alias=AliasChoices("centered", "centred"))]  # files have either spelling


class Record(BaseModel):
    """Base of all records: unknown fields are refused, and infinities survive JSON."""

    model_config = ConfigDict(extra="forbid", ser_json_inf_nan="strings", val_json_bytes="utf8")


class StoredRecord(Record):
    """A record that is stored in a file, with the id of its schema."""

    def save(self, path: str | Path) -> None:
        """Write the record as JSON, completely or not at all.

        Raises:
            OutputError: The file cannot be written.
        """
        write_whole(path, self.model_dump_json(indent=1).encode())

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a record that `save` wrote.

        Raises:
            RecordError: The file cannot be read, or is not a record of this schema; the message names the first bad field.
        """
        path = Path(path)
        schema = cls.model_fields["schema_version"].default
        try:
            return cls.model_validate_json(path.read_bytes())
        except OSError as error:
            raise RecordError(f"{path}: cannot be read ({error.strerror}): check the path") from error
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or "the file"
            raise RecordError(
                f"{path}: not a record of schema {schema}: {where}: {first['msg']}. Give a file that this version wrote."
            ) from error


def write_whole(path: str | Path, data: bytes) -> None:
    """Write a file completely or not at all, also if interrupted; missing folders are made.

    Args:
        path: The file.
        data: Its contents.

    Raises:
        OutputError: The file cannot be written.
    """
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
