"""How far it is, on a terminal's standard error."""

import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager


@contextmanager
def image_progress(what: str) -> Generator[Callable[[int, int], None] | None]:
    """Gives what shows (images done, all images), or None where there is no terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
