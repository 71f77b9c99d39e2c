"""`pitstop data stage`: a packed dataset from a bucket or a slow mount to the local disk."""

import json
import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from pitstop.cli.options import Set, parse_sets
from pitstop.core.errors import InputError
from pitstop.core.exit_codes import FINISHED, INTERRUPTED


def stage(
    url: Annotated[
        str, typer.Argument(help="A packed dataset: s3://, gs:// or az://, or a directory")
    ],
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Where it shall lie")],
    recipe: Annotated[
        str | None, typer.Option(help="Fetch first what this recipe's data fractions need first")
    ] = None,
    set_: Set = None,
    concurrency: Annotated[
        int | None, typer.Option(min=1, help="Files under way at once (default: 16)")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON")] = False,
) -> int:
    """Copy a packed dataset to the local disk; the same command goes on after a kill."""
    from pitstop.data.stage import CONCURRENCY, StagingStoppedError
    from pitstop.data.stage import stage as stage_dataset
    from pitstop.runtime.preemption import Preemption

    if set_ and recipe is None:
        raise InputError("--set changes a recipe: give --recipe too")
    with Preemption() as preemption, _progress() as progress:
        try:
            report = stage_dataset(
                url,
                directory,
                fractions=_fractions(recipe, set_) if recipe else (1.0,),
                concurrency=concurrency or CONCURRENCY,
                progress=progress,
                should_stop=lambda: preemption.requested,
            )
        except StagingStoppedError:
            typer.echo(f"stopped by {preemption.reason}: the same command goes on", err=True)
            return INTERRUPTED
    if as_json:
        answer = {
            "path": str(report.path),
            "files": report.files,
            "bytes": report.bytes,
            "copied_files": report.copied_files,
            "copied_bytes": report.copied_bytes,
            "seconds": round(report.seconds, 3),
            "mb_per_second": round(report.mb_per_second, 1),
        }
        typer.echo(json.dumps(answer, indent=2))
    else:
        whole = f"{directory}: {report.files} files, {report.bytes / 1e6:,.1f} MB"
        copied = f"{report.copied_files} copied, {report.copied_bytes / 1e6:,.1f} MB"
        rate = f"{report.seconds:.1f} s, {report.mb_per_second:,.0f} MB/s"
        typer.echo(f"{whole}; {copied} in {rate}" if report.copied_bytes else f"{whole}; all there")
    return FINISHED


def _fractions(recipe: str, sets: list[str] | None) -> tuple[float, ...]:
    """Returns the data fractions of a recipe's phases, in their order."""
    from pitstop.core.recipe import load_recipe

    return tuple(phase.data_fraction for phase in load_recipe(recipe, parse_sets(sets)).phases)


@contextmanager
def _progress() -> Generator[Callable[[int, int], None] | None]:
    """Gives what shows the bytes that are there, on a terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TransferSpeedColumn

    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("staging", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
