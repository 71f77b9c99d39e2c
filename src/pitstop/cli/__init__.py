"""The command line: one module a verb. A verb imports what it needs when it runs.

Exit codes: 0 finished or target met; 2 bad input; 70 internal error; 75 interrupted and durable;
76 diverged; 77 budget spent; 130 interrupted twice.
"""

import errno
import os
import sys
import traceback

import typer

from pitstop import __version__
from pitstop.cli import (
    ablate,
    calibrate,
    data,
    devices,
    doctor,
    evaluate,
    export,
    fetch,
    launch,
    lr_find,
    plan,
    predict,
    prices,
    recipes,
    report,
    simulate,
    train,
    verify_resume,
    watch,
)
from pitstop.core.errors import InputError, RankFailedError
from pitstop.core.exit_codes import BAD_INPUT, INTERNAL, KILLED
from pitstop.launch.init import leave_process_1
from pitstop.runtime.place import Place, end_process

HUGE_PAGES = ("THP_MEM_ALLOC_ENABLE", "1")
"""Has torch ask for huge pages where a tensor on the CPU is large; it reads this when it begins.

Each step of training has its memory cleared by the system, page by page. With pages of 2 MB instead
of 4 kB, a step of cifarnet with 1,024 images took 1.0 s instead of 1.25 (two cores, medians of 4
runs of 8 steps in turn).
"""

OF_THE_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EIO)
"""Errors of the system that are for the user to mend."""

app = typer.Typer(
    name="pitstop",
    help="Train image classifiers fast and cheaply on machines that may be taken away.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command("train")(train.train)
app.command("plan")(plan.plan)
app.command("simulate")(simulate.simulate)
app.command("prices")(prices.prices)
app.command("calibrate")(calibrate.calibrate)
app.command("watch")(watch.watch)
app.command("eval")(evaluate.evaluate)
app.command("predict")(predict.predict)
app.command("export")(export.export)
app.command("report")(report.report)
app.command("ablate")(ablate.ablate)
app.command("lr-find")(lr_find.lr_find)
app.command("verify-resume")(verify_resume.verify_resume)
app.command("devices")(devices.devices)
app.command("doctor")(doctor.doctor)
app.command("fetch")(fetch.fetch)
app.add_typer(data.app, name="data")
app.add_typer(recipes.app, name="recipes")
app.add_typer(launch.app, name="launch")


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def root(
    version: bool = typer.Option(False, "--version", callback=_version, help="Print the version."),
) -> None:
    pass


def main() -> None:
    """Runs the command line; the only place where exceptions become exit codes."""
    leave_process_1()
    os.environ.setdefault(*HUGE_PAGES)
    code = run(sys.argv[1:])
    if Place.find() is not None:
        end_process(code)
    sys.exit(code)


def run(arguments: list[str]) -> int:
    """Runs a command and returns its exit code."""
    place = Place.find() or Place()
    if sys.platform == "win32":
        typer.echo("pitstop does not run on Windows: use WSL", err=True)
        return BAD_INPUT
    try:
        return app(arguments or ["--help"], standalone_mode=False, obj=arguments) or 0
    except InputError as error:
        if place.local_rank == 0:
            typer.echo(f"pitstop: {error}", err=True)
        return BAD_INPUT
    except RankFailedError as error:
        if error.shown:
            typer.echo(f"pitstop: {error}", err=True)
        return error.exit_code
    except KeyboardInterrupt:
        if place.rank == 0:
            typer.echo("pitstop: interrupted", err=True)
        return KILLED
    except OSError as error:
        if error.errno not in OF_THE_DISK:
            return _internal(place)
        where = error.filename or "the disk"
        typer.echo(f"pitstop: {where}: {error.strerror}: mend that, and start it again", err=True)
        return BAD_INPUT
    except Exception as error:
        if hasattr(error, "format_message"):  # of typer, which may bring its own click
            typer.echo(f"pitstop: {error.format_message()}", err=True)  # pyright: ignore[reportAttributeAccessIssue]
            return BAD_INPUT
        return _internal(place)


def _internal(place: Place) -> int:
    """Shows the exception that is being handled, in full."""
    traceback.print_exc()
    which = f" of rank {place.rank}" if place.rank > 0 else ""
    typer.echo(f"pitstop: internal error{which}: please report the lines above", err=True)
    return INTERNAL
