"""`pitstop launch local`."""

import typer

from pitstop.cli.launch.common import DryRun, make_request
from pitstop.cli.options import RecipeName

RESTARTS = 3


def local(context: typer.Context, recipe: RecipeName, dry_run: DryRun = False) -> None:
    """Train on this machine, a rank a GPU; what fails starts again, up to 3 times.

    Takes the options of `train`. Creates nothing but the run directory, and does not ask.
    """
    from pitstop.cli import run
    from pitstop.launch.request import shown

    request = make_request(context, recipe, data=None, set_by_launcher=())
    command = ["train", recipe, "--max-restarts", str(RESTARTS), *request.train_options]
    if dry_run:
        typer.echo(shown(["pitstop", *command]))
        return
    raise typer.Exit(run(command))
