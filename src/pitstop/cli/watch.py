"""`pitstop watch`: how runs go, on one screen."""

import time
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:  # they take their time
    from rich.console import Console, RenderableType

    from pitstop.report.follow import Look

Draw = Callable[[], tuple["RenderableType", bool]]
"""Returns the screen as it is now, and whether all runs are over."""


def watch(
    runs: Annotated[
        list[str],
        typer.Argument(metavar="RUN...", help="Run directories, or URLs of their copies"),
    ],
    once: Annotated[bool, typer.Option("--once", help="Print one screen and end")] = False,
    every: Annotated[float, typer.Option(min=0.5, help="Seconds from one look to the next")] = 2.0,
) -> None:
    """Show how runs go: progress, curves, speed, checkpoints, cost. Ctrl-C ends the watching.

    It ends by itself when the runs are over. Nothing is written into them.
    """
    from pathlib import Path
    from tempfile import TemporaryDirectory

    from rich.console import Console

    from pitstop.report.follow import follow
    from pitstop.report.vitals import Machine
    from pitstop.report.watch import is_over, screen

    console, machine = Console(), Machine()
    live = console.is_terminal and not console.is_dumb_terminal and not once
    with TemporaryDirectory(prefix="pitstop-") as scratch, suppress(KeyboardInterrupt):
        followed = [follow(run, Path(scratch) / str(i)) for i, run in enumerate(runs)]
        disk = next((Path(run) for run in runs if Path(run).is_dir()), Path())

        def draw() -> "tuple[RenderableType, bool]":
            looks = [run.look() for run in followed]
            drawn = screen(
                looks,
                machine.look(disk) if any(map(_is_here, looks)) else None,
                width=console.width,
                height=console.height - (not live),
                now=time.time(),
                ascii_only=console.options.ascii_only,
            )
            return drawn, all(map(is_over, looks))

        drawn, over = draw()
        if live and not over:
            drawn = _live(console, draw, every)
        console.print(drawn)


def _is_here(look: "Look") -> bool:
    """Says whether a run goes on, as far as is known, on this machine."""
    from socket import gethostname

    running = look.state.get("status") == "running"
    return running and bool(look.starts) and look.starts[-1]["host"] == gethostname()


def _live(console: "Console", draw: Draw, every: float) -> "RenderableType":
    """Draws in place until all runs are over; returns the last screen."""
    from rich.live import Live

    with Live(console=console, screen=True, auto_refresh=False) as shown:
        while True:
            drawn, over = draw()
            if over:
                return drawn
            shown.update(drawn, refresh=True)
            time.sleep(every)
