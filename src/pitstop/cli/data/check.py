"""`pitstop data check`: is a packed dataset whole?"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pitstop.cli.data.progress import image_progress
from pitstop.cli.options import Workers
from pitstop.core.errors import InputError
from pitstop.core.machine import cores

if TYPE_CHECKING:
    from pitstop.data.check import CheckReport


def check(
    data: Annotated[str, typer.Argument(help="A packed dataset")],
    workers: Workers = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON")] = False,
) -> None:
    """Check files, rows and images of a packed dataset, and that train and val share no image."""
    from pitstop.data.check import check as check_dataset
    from pitstop.data.resolve import resolve

    path = resolve(data)
    if not isinstance(path, Path):
        raise InputError(f"{data} is not packed, so there is nothing to compare it to: pack it")
    with image_progress("checking") as progress:
        report = check_dataset(path, workers=workers or cores(), progress=progress)
    if as_json:
        typer.echo(json.dumps(_as_json(path, report), indent=2))
    else:
        _print(path, report)
    if wrong := _wrong(report):
        raise InputError(f"{path}: {wrong}")


def _as_json(path: Path, report: "CheckReport") -> dict[str, Any]:
    return {
        "path": str(path),
        "whole": not report.problems,
        "files": report.files,
        "images": report.images,
        "problems": [problem._asdict() for problem in report.problems],
        "duplicates": [
            {"train": train._asdict(), "val": val._asdict()} for train, val in report.duplicates
        ],
    }


def _print(path: Path, report: "CheckReport") -> None:
    for file, row, name, why in report.problems:
        where = f"{file} row {row} ({name})" if row is not None else file
        typer.echo(f"{where}: {why}")
    for train, val in report.duplicates:
        typer.echo(
            f"{val.file} row {val.row} ({val.name}): "
            f"is also in {train.file} row {train.row} ({train.name})"
        )
    if not _wrong(report):
        typer.echo(
            f"{path}: {report.files:,} files and {report.images:,} images are as they should be"
        )


def _wrong(report: "CheckReport") -> str:
    """Returns what is wrong and the fix, in a line; "" if nothing is."""
    damaged = list(dict.fromkeys(problem.file for problem in report.problems))
    if damaged:
        files = ", ".join(damaged[:3]) + (", ..." if len(damaged) > 3 else "")
        what = f"{len(damaged):,} files are" if len(damaged) > 1 else "1 file is"
        rows = sum(problem.row is not None for problem in report.problems)
        return f"{what} damaged ({files}), {rows:,} rows are named: pack or copy it again"
    images = len({val for _, val in report.duplicates})
    if images:
        what = f"{images:,} validation images are training images"
        what = what if images > 1 else "1 validation image is a training image"
        return f"{what} too: remove one of each two from the source and pack again"
    return ""
