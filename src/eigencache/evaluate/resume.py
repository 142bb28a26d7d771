"""Save the results of long computations line by line, so that an interrupted run can be resumed."""

import json
from pathlib import Path
from typing import Any

from eigencache.errors import OutputError


class ResumableResults:
    """Results of a run in a JSON-lines file, with those of an earlier identical run.

    Args:
        path: File, or None to save nothing.
        key: Everything that determines the results. A file with another key, or an incomplete last line, is discarded.
    """

    def __init__(self, path: Path | None, key: dict[str, Any]) -> None:
        self.path, self._key = path, json.dumps(key, sort_keys=True, default=str)
        self.done: list[Any] = self._read()
        self._begun = False  # the first `add` rewrites the file, to discard an incomplete line or another key

    def _read(self) -> list[Any]:
        if self.path is None or not self.path.exists():
            return []
        first, *lines = self.path.read_text(encoding="utf8").split("\n")
        if first != self._key:
            return []
        return [json.loads(line) for line in lines[:-1]]  # text after the last line break is empty or incomplete

    def add(self, result: Any) -> None:
        """Append one result to the file. Raises `OutputError` if the file cannot be written."""
        self.done.append(result)
        if self.path is None:
            return
        lines = [json.dumps(result)] if self._begun else [self._key, *map(json.dumps, self.done)]
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a" if self._begun else "w", encoding="utf8") as file:
                file.writelines(f"{line}\n" for line in lines)
        except OSError as error:
            raise OutputError(f"{self.path}: cannot be written ({error.strerror}). Choose another output.") from error
        self._begun = True

    def finish(self) -> None:
        """Delete the file, after the final output was written."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)
