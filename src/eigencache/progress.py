"""Progress of long work: one type of callback for everything that takes more than a moment."""

from collections.abc import Callable

Progress = Callable[[str, int, int], None]  # what is being done, units done, units in all


def silent(_what: str, _done: int, _of: int) -> None:
    """Ignore progress."""
