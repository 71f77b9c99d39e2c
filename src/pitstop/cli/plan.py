"""`pitstop plan`: what a run will do, before it does it."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pitstop.cli.options import Set, parse_sets
from pitstop.core.errors import InputError

if TYPE_CHECKING:  # it takes its time
    from pitstop.core.timeline import Timeline

IMAGENET = 1_281_167
"""Training images of ImageNet-1k, which a recipe that names no data is planned for."""


def plan(
    recipe: Annotated[str, typer.Argument(help="A recipe's name or a YAML file")] = "demo",
    other: Annotated[str | None, typer.Argument(help="Another, to compare it with")] = None,
    samples: Annotated[
        int | None, typer.Option(min=1, help="Training images (default: the recipe's data)")
    ] = None,
    data: Annotated[str | None, typer.Option(help="Count the training images of this")] = None,
    set_: Set = None,
    epochs: Annotated[float | None, typer.Option(help="Epochs of the whole run")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON")] = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print CSV, a row an epoch")] = False,
    plot: Annotated[Path | None, typer.Option(help="Draw the plan into this PNG")] = None,
) -> None:
    """Show what a recipe will do: phases, steps, shapes, learning rate. Or how two differ."""
    if as_json and as_csv:
        raise InputError("--json and --csv exclude each other")
    if as_csv and other is not None:
        raise InputError("--csv: is for one recipe; --json has both")
    overrides = ({"epochs": epochs} if epochs is not None else {}) | parse_sets(set_)
    names = [recipe] if other is None else [recipe, other]
    plans = [_plan(name, overrides, samples, data) for name in names]
    _print(plans, as_json=as_json, as_csv=as_csv)
    if plot is not None:
        from pitstop.plan.picture import draw

        try:
            draw(plans, plot)
        except OSError as error:
            raise InputError(f"--plot {plot}: cannot be written: {error.strerror}") from None
        typer.echo(f"drawn into {plot}", err=True)


def _plan(
    name: str, overrides: dict[str, Any], samples: int | None, data: str | None
) -> "Timeline":
    from pitstop.core.recipe import load_recipe
    from pitstop.core.timeline import Timeline

    recipe = load_recipe(name, overrides)
    return Timeline.planned(recipe, samples or _count(data or recipe.data) or IMAGENET)


def _print(plans: list["Timeline"], *, as_json: bool, as_csv: bool) -> None:
    from pitstop.plan import compare, explain

    if as_json:
        one = len(plans) == 1
        data = explain.as_json(plans[0]) if one else compare.compared_json(plans)
        typer.echo(json.dumps(data, indent=2))
    elif as_csv:
        typer.echo(explain.as_csv(plans[0]), nl=False)
    else:
        from rich.console import Console

        one = len(plans) == 1
        Console().print(explain.table(plans[0]) if one else compare.compared_table(plans))


def _count(data: str | None) -> int | None:
    if data is None:
        return None
    from pitstop.data.resolve import count_training_images

    return count_training_images(data, say=lambda note: typer.echo(note, err=True))
