"""`pitstop ablate`: which trick of a recipe is worth its time."""

import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pitstop.cli.options import Data, Set, parse_sets
from pitstop.core.errors import InputError

if TYPE_CHECKING:
    from pitstop.core.recipe import Recipe


def ablate(
    recipe: Annotated[str, typer.Argument(help="A recipe's name or a YAML file")],
    data: Data = None,
    drop: Annotated[
        list[str] | None,
        typer.Option(metavar="TRICK", help="Compare with the recipe without it: mixup, ema, ..."),
    ] = None,
    variant: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME:KEY=VALUE[,KEY=VALUE]", help="Compare with the recipe so changed"
        ),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Pairs of runs: seeds 0, 1, ...")] = 3,
    epochs: Annotated[float | None, typer.Option(help="Epochs of each run")] = None,
    set_: Set = None,
    out: Annotated[
        Path | None, typer.Option(help="The directory of all runs (default: runs/ablate-RECIPE)")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON")] = False,
) -> None:
    """Train a recipe with and without some of its tricks, and compare the pairs.

    The same command goes on with an ablation that was stopped.
    """
    from pitstop.runtime.place import Place

    if Place.find() is not None:
        raise InputError("pitstop ablate starts its runs itself: start it once, without torchrun")
    stated = {
        key: value for key, value in (("data", data), ("epochs", epochs)) if value is not None
    }
    variants = _variants(recipe, stated | parse_sets(set_), drop or [], variant or [])
    baseline = variants["baseline"]
    out = out or Path("runs") / f"ablate-{baseline.name.replace('/', '-')}"

    from rich.console import Console

    from pitstop.engine import ablate as engine

    console = Console(highlight=False, soft_wrap=True, stderr=as_json)
    stdout = sys.stderr if as_json else sys.stdout
    code = engine.ablate(variants, out, seeds=seeds, console=console, stdout=stdout)
    results = out / "results.json"
    if as_json and results.exists():
        typer.echo(results.read_text(), nl=False)
    raise typer.Exit(code)


def _variants(
    recipe: str, overrides: dict[str, Any], drops: list[str], changes: list[str]
) -> "dict[str, Recipe]":
    """Returns the recipes to train by their names, the baseline first."""
    from pitstop.core.recipe import load_recipe
    from pitstop.engine.drops import without

    if not drops and not changes:
        raise InputError("nothing to compare with: give --drop TRICK or --variant NAME:KEY=VALUE")
    named = [_change(change) for change in changes]
    if any("seed" in values for values in (overrides, *(values for _, values in named))):
        raise InputError("seed: the runs have the seeds 0, 1, ...: say with --seeds how many")
    baseline = load_recipe(recipe, overrides)
    if baseline.data is None:
        raise InputError(f"recipe {baseline.name} names no data: give --data")
    variants = {"baseline": baseline}
    for trick in drops:
        variants[f"no-{trick}"] = without(baseline, trick)
    for name, values in named:
        if name in variants:
            raise InputError(f"--variant {name}: there is one of this name already: take another")
        variants[name] = load_recipe(recipe, overrides | values)
        if variants[name] == baseline:
            raise InputError(f"--variant {name}: changes nothing: the recipe is like that already")
    return variants


def _change(text: str) -> tuple[str, dict[str, Any]]:
    """Returns the name and the overrides of a `--variant`."""
    match = re.fullmatch(r"([\w.-]*\w):(.+=.*)", text, re.DOTALL)
    if match is None:
        raise InputError(f"--variant {text}: write it as NAME:KEY=VALUE[,KEY=VALUE]")
    changes = re.split(r",(?=[\w.]+=)", match[2])
    return match[1], parse_sets(changes)
