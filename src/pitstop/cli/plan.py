"""`pitstop plan`: what a run will do, before it does it."""

import json
from pathlib import Path
from typing import Annotated

import typer

from pitstop.cli.options import Set, parse_sets
from pitstop.core.errors import InputError

IMAGENET = 1_281_167
"""Training images of ImageNet-1k, which a recipe that names no data is planned for."""


def plan(
    recipe: Annotated[str, typer.Argument(help="A recipe's name or a YAML file")] = "demo",
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
    """Show what a recipe will do: phases, steps, shapes, learning rate."""
    from pitstop.core.recipe import load_recipe
    from pitstop.core.timeline import Timeline
    from pitstop.plan import explain

    if as_json and as_csv:
        raise InputError("--json and --csv exclude each other")
    overrides = {"epochs": epochs} if epochs is not None else {}
    loaded = load_recipe(recipe, overrides | parse_sets(set_))
    count = samples or _count(data or loaded.data) or IMAGENET
    timeline = Timeline(loaded, num_samples=count)
    if as_json:
        typer.echo(json.dumps(explain.as_json(timeline), indent=2))
    elif as_csv:
        typer.echo(explain.as_csv(timeline), nl=False)
    else:
        from rich.console import Console

        Console().print(explain.table(timeline))
    if plot is not None:
        from pitstop.plan.picture import draw

        try:
            draw(timeline, plot)
        except OSError as error:
            raise InputError(f"--plot {plot}: cannot be written: {error.strerror}") from None
        typer.echo(f"drawn into {plot}", err=True)


def _count(data: str | None) -> int | None:
    if data is None:
        return None
    from pitstop.data.resolve import count_training_images

    return count_training_images(data, say=lambda note: typer.echo(note, err=True))
