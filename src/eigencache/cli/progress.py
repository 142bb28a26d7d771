"""Progress bars on stderr: stdout stays clean for tables and pipes."""

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from eigencache.progress import Progress as OnProgress


@contextmanager
def progress_bar(name: str) -> Iterator[OnProgress]:
    """Yields `on_progress(what, done, of)`: one bar per `what`, gone when all is done; a line each without a terminal."""
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        tasks = {}

        def on_progress(what: str, done: int, of: int) -> None:
            if what not in tasks:
                tasks[what] = progress.add_task(f"{name}: {what}", total=of)
                if not console.is_terminal:
                    console.print(f"{name}: {what}", markup=False, highlight=False)
            elif not done:  # the same work begins anew, and so does its time
                progress.reset(tasks[what], total=of)
            progress.update(tasks[what], completed=done)

        yield on_progress
