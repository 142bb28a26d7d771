"""Progress bars on stderr: stdout stays clean for tables and pipes."""

from collections.abc import Iterator
from contextlib import contextmanager
from time import monotonic

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from eigencache.progress import Progress as OnProgress

SECONDS = 30  # between two lines of counts, where there is no terminal


@contextmanager
def progress_bar(name: str) -> Iterator[OnProgress]:
    """Yields `on_progress(what, done, of)`: one bar per `what`, gone when all is done.

    Without a terminal, each `what` has a line when it begins, and one with its counts every 30 seconds.
    """
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        tasks, said = {}, monotonic()

        def on_progress(what: str, done: int, of: int) -> None:
            nonlocal said
            if what not in tasks:
                tasks[what] = progress.add_task(f"{name}: {what}", total=of)
                if not console.is_terminal:
                    console.print(f"{name}: {what}", markup=False, highlight=False)
            elif not done:  # the same work begins anew, and so does its time
                progress.reset(tasks[what], total=of)
            elif not console.is_terminal and monotonic() - said >= SECONDS:
                console.print(f"{name}: {what}, {done:,} of {of:,}", markup=False, highlight=False)
                said = monotonic()
            progress.update(tasks[what], completed=done)

        yield on_progress
