"""What all launchers share: their options, and how the options of `train` are passed on."""

from collections.abc import Collection, Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand
from typer.main import get_command

from pitstop.cli.plan import IMAGENET
from pitstop.cli.train import checked, recipe_overrides, train
from pitstop.core.errors import InputError

if TYPE_CHECKING:  # they take their time
    from pitstop.core.recipe import Recipe
    from pitstop.launch.request import Request
    from pitstop.plan.cost import Estimate

LaunchData = Annotated[
    str | None, typer.Option("--data", help="What to train on, as the machine sees it: s3://...")
]
Name = Annotated[
    str | None, typer.Option(help="Of the run, and of all that is made (default: RECIPE-TIME)")
]
Spot = Annotated[bool, typer.Option("--spot", help="On machines that may be taken away, for less")]
NodeCount = Annotated[int, typer.Option("--nodes", min=1, help="Machines that train together")]
RemoteUrl = Annotated[
    str | None,
    typer.Option("--remote", metavar="URL", help="Keep the run in this folder of a bucket"),
]
Region = Annotated[str | None, typer.Option(help="AWS region (default: AWS_REGION, the profile's)")]
Samples = Annotated[
    int | None, typer.Option(min=1, help="Training images, for the price (default: ImageNet's)")
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Print what would be made; make nothing, ask nobody")
]
Yes = Annotated[bool, typer.Option("--yes", help="Do not ask")]

TRAIN_OPTIONS = "pitstop.launch.train_options"
"""Under this key a launcher's context has the options of `train`."""

SET_BY_LAUNCHER = ("--out", "--node-rank", "--rdzv-endpoint")


class LaunchCommand(TyperCommand):
    """The command of a launcher (`app.command(cls=LaunchCommand)`): it takes train's options too.

    They may stand anywhere. Those that the launcher has itself (`--data`) are its own.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        own, ctx.meta[TRAIN_OPTIONS] = _split(self, args)
        return super().parse_args(ctx, own)


def _split(command: Any, arguments: list[str]) -> tuple[list[str], tuple[str, ...]]:
    """Returns the arguments that are the command's own, and the options that only `train` has."""
    mine, trains = _options(command), _options(get_train())
    own: list[str] = []
    passed: list[str] = []
    words = iter(arguments)
    for word in words:
        name, equals, _ = word.partition("=")
        known = mine.get(name)
        to = passed if known is None and name in trains else own
        to.append(word)
        takes_value = mine.get(name, trains.get(name, False))
        if takes_value and not equals:
            to.extend(next(([value] for value in words), []))
    return own, tuple(passed)


def _options(command: Any) -> dict[str, bool]:
    """Returns whether each option of a command takes a value, by its names."""
    return {
        name: not (parameter.is_flag or parameter.count)
        for parameter in command.params
        if parameter.param_type_name == "option"
        for name in (*parameter.opts, *parameter.secondary_opts)
    } | {"--help": False}


def get_train() -> Any:
    """Returns `train` as a command that parses arguments."""
    app = typer.Typer(add_completion=False)
    app.command("train")(train)
    return get_command(app)


def make_request(
    context: typer.Context,
    recipe: str,
    *,
    data: str | None,
    name: str | None = None,
    spot: bool = False,
    nodes: int = 1,
    remote: str | None = None,
    machine: str | None = None,
    samples: int | None = None,
    set_by_launcher: Collection[str] = SET_BY_LAUNCHER,
) -> "Request":
    """Returns what is to be launched, checked as `train` would: its options, and the recipe.

    Args:
        context: that of a `LaunchCommand`.
        machine: whose time and price are estimated (`p4d.24xlarge`, `ml.p4d.24xlarge`).
        samples: training images, for the estimate.
        set_by_launcher: options of `train` that the user cannot give.

    Raises:
        InputError: with the option or key, and the fix. A wrong option of `train` raises what
            typer does.
    """
    from pitstop.core.recipe import load_recipe
    from pitstop.launch.request import Request, default_name

    options: tuple[str, ...] = context.meta[TRAIN_OPTIONS]
    for word in options:
        option = word.partition("=")[0]
        if option in set_by_launcher:
            raise InputError(f"{option}: the launcher sets it itself: leave it out")
    parsed = get_train().make_context("train", [recipe, *options]).params
    overrides = recipe_overrides(parsed)
    loaded = load_recipe(recipe, overrides)
    checked(parsed | {"remote": remote}, overrides)
    request = Request(
        name=name or default_name(recipe),
        recipe=loaded,
        recipe_name=recipe,
        data=data or loaded.data,
        train_options=options,
        spot=spot,
        nodes=nodes,
        remote=remote,
    )
    if machine is None:
        return request
    estimated = _estimate(request, overrides, machine, samples or IMAGENET, parsed["minutes"])
    return replace(request, estimate=estimated)


def _estimate(
    request: "Request", overrides: dict[str, Any], name: str, samples: int, minutes: float | None
) -> "Estimate | None":
    """Returns what the run should take and cost; None, and a note, where that is not known."""
    from pitstop.core.recipe import load_recipe
    from pitstop.core.timeline import Timeline
    from pitstop.plan.budget import epochs_within
    from pitstop.plan.cost import estimate
    from pitstop.plan.machines import find_machine

    def of(recipe: "Recipe") -> "Estimate":
        timeline = Timeline.planned(recipe, samples)
        return estimate(timeline, machine, nodes=request.nodes, spot=request.spot)

    def after(epochs: float) -> "Recipe":
        return load_recipe(request.recipe_name, overrides | {"epochs": epochs})

    try:
        machine = find_machine(name)
        if minutes is None:
            return of(request.recipe)
        return of(after(epochs_within(minutes, lambda e: of(after(e)).minutes, unit="minutes")))
    except InputError as error:
        typer.echo(f"pitstop: no estimate: {error}", err=True)
        return None


def needs_data(request: "Request") -> str:
    """Returns what to train on; raises InputError where neither --data nor the recipe names it."""
    if request.data is None:
        raise InputError(f"recipe {request.recipe.name} names no data: give --data")
    return request.data


def print_dry_run(lines: Iterable[str]) -> None:
    """Prints what a launcher would create."""
    typer.echo("\n".join([*lines, "dry run: nothing was created"]))
