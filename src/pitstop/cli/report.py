"""`pitstop report`: runs on one page, to judge and to share."""

import math
import shlex
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated

import typer

from pitstop.cli.options import note, parse_sets
from pitstop.core.errors import InputError

if TYPE_CHECKING:  # they take their time
    from pitstop.core.recipe import Recipe
    from pitstop.core.timeline import Timeline
    from pitstop.report.facts import Facts
    from pitstop.report.page import Story


def report(
    runs: Annotated[
        list[str], typer.Argument(metavar="RUN...", help="Run directories, or URLs of runs")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="The page")] = Path("report.html"),
    data: Annotated[
        str | None,
        typer.Option(help="Evaluate the best weights on it: classes, confusions, mistakes"),
    ] = None,
    price: Annotated[
        float | None, typer.Option(min=0, help="Dollars an hour, where a run states none")
    ] = None,
) -> None:
    """Write one HTML page of a run, or of several side by side; it needs no network."""
    from pitstop.io.fetch import place_of
    from pitstop.io.run_directory import RunDirectory
    from pitstop.io.storage import write_text
    from pitstop.report.facts import read_facts
    from pitstop.report.page import page

    if out.is_dir():
        raise InputError(f"--out {out}: is a directory: name a file")
    found = [RunDirectory(place_of(run, note)) for run in runs]
    if data is not None:
        from pitstop.engine.predict import assess

        for run in found:
            assess(run.path, data)
    html = page([_story(read_facts(run, price)) for run in found])
    try:
        write_text(out, html)
    except OSError as error:
        raise InputError(f"--out {out}: cannot be written: {error.strerror}") from None
    typer.echo(f"written: {out}", err=True)


def _story(facts: "Facts") -> "Story":
    """Returns a run with its plan, its recipe and the command that repeats it."""
    from pitstop.core.recipe import parse_recipe
    from pitstop.report.page import Story

    try:
        recipe = parse_recipe(facts.state.get("recipe") or {}, "run.json")
    except InputError as error:
        remark = f"The recipe is not one of this version of pitstop: {error}."
        return Story(facts, command=None, recipe=None, plan=None, remark=remark)
    plan = _plan(recipe, facts)
    return Story(
        facts,
        _command(recipe),
        recipe=_yaml(recipe),
        plan=None if plan is None else _picture(plan),
        remark=_remark(plan, facts),
    )


def _plan(recipe: "Recipe", facts: "Facts") -> "Timeline | None":
    """Returns the plan of a run's recipe, with the lr that it found; None before a first record."""
    from pitstop.core.timeline import Amendment, FoundLr, Timeline
    from pitstop.report.facts import training_images

    images, lr = training_images(facts), facts.state.get("found_lr")
    if images is None:
        return None
    if lr is None:
        return Timeline.planned(recipe, images)
    return Timeline(recipe, [Amendment(step=0, change=FoundLr(lr=lr))], num_samples=images)


def _picture(plan: "Timeline") -> bytes:
    from pitstop.plan.picture import draw

    with TemporaryDirectory() as folder:
        path = Path(folder) / "plan.png"
        draw([plan], path)
        return path.read_bytes()


def _remark(plan: "Timeline | None", facts: "Facts") -> str | None:
    if plan is None:
        return "Nothing is recorded yet, from which to tell the plan."
    steps = facts.state.get("steps", plan.last)
    if plan.last == steps:
        return None
    return (
        f"The recipe alone comes to {plan.last:,} steps, the run to {steps:,}: it was fitted, "
        "extended or changed on its way, as it said below. The command repeats the recipe alone."
    )


def _yaml(recipe: "Recipe") -> str:
    import yaml

    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False)


def _in_short(value: object) -> str:
    """Returns a value as YAML on one line."""
    import yaml

    text = yaml.safe_dump(value, default_flow_style=True, width=math.inf)
    return text.removesuffix("...\n").rstrip("\n")


def _command(recipe: "Recipe") -> str:
    """Returns the command that trains by a recipe: short where a bundled one comes to the same."""
    from pitstop.core.recipe import bundled_recipes, load_recipe

    wanted = recipe.model_dump(mode="json")
    if recipe.name in bundled_recipes():
        bundled = load_recipe(recipe.name).model_dump(mode="json")
        sets = [
            f"{key}={_in_short(value)}"
            for key, value in wanted.items()
            if key != "phases" and value != bundled[key]
        ]
        try:
            same = load_recipe(recipe.name, parse_sets(sets)).model_dump(mode="json") == wanted
        except InputError:  # what it is made of cannot be stated so
            same = False
        if same:
            options = (word for each in sets for word in ("--set", each))
            return shlex.join(["pitstop", "train", recipe.name, *options])
    return "# recipe.yaml: the whole recipe, below\npitstop train recipe.yaml"
