"""Long work that survives an interruption: results go to a file line by line, and are taken up from there."""

import json
from pathlib import Path
from typing import Any

from eigencache.errors import OutputError


class ResumableResults:
    """Lines of JSON beside the final output; lines of other settings, or a torn last line, are dropped.

    `path` None keeps nothing. `key`: whatever decides the results; a file of another key is begun anew.
    """

    def __init__(self, path: Path | None, key: dict[str, Any]) -> None:
        self.path, self._key = path, json.dumps(key, sort_keys=True, default=str)
        self.done: list[Any] = self._read()
        self._begun = False  # the first line of this run replaces the file, a torn line or another key included

    def _read(self) -> list[Any]:
        if self.path is None or not self.path.exists():
            return []
        first, *lines = self.path.read_text(encoding="utf8").split("\n")
        if first != self._key:
            return []
        return [json.loads(line) for line in lines[:-1]]  # what stands behind the last line break is torn or empty

    def add(self, result: Any) -> None:
        """Append one result; it is in the file when this returns."""
        self.done.append(result)
        if self.path is None:
            return
        lines = [json.dumps(result)] if self._begun else [self._key, *map(json.dumps, self.done)]
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a" if self._begun else "w", encoding="utf8") as file:
                file.writelines(f"{line}\n" for line in lines)
        except OSError as error:
            raise OutputError(f"{self.path}: cannot be written ({error.strerror}): choose another output") from error
        self._begun = True

    def finish(self) -> None:
        """The final output exists: the lines are no longer needed."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)
