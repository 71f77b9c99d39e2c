"""`pitstop launch`: run a recipe on this machine, or on others."""

import typer

from pitstop.cli.launch.common import LaunchCommand
from pitstop.cli.launch.ec2 import ec2
from pitstop.cli.launch.local import local
from pitstop.cli.launch.sagemaker import sagemaker
from pitstop.cli.launch.sky import sky

app = typer.Typer(
    help="Run a recipe on this machine, or on others.", no_args_is_help=True, rich_markup_mode=None
)
app.command("local", cls=LaunchCommand)(local)
app.command("sagemaker", cls=LaunchCommand)(sagemaker)
app.command("ec2", cls=LaunchCommand)(ec2)
app.command("sky", cls=LaunchCommand)(sky)
