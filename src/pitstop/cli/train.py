"""`pitstop train`."""

import math
from pathlib import Path
from typing import Annotated, Any

import typer

from pitstop.cli.options import Set, Workers, parse_sets
from pitstop.core.errors import InputError


def train(
    recipe: Annotated[
        str, typer.Argument(help="A recipe's name (see `pitstop recipes`) or a YAML file")
    ] = "demo",
    data: Annotated[
        str | None, typer.Option(help="A packed dataset, a class folder, or `digits`")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="The run directory (default: runs/RECIPE)")
    ] = None,
    set_: Set = None,
    epochs: Annotated[float | None, typer.Option(help="Epochs of the whole run")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Images a step, over all ranks")] = None,
    lr: Annotated[float | None, typer.Option(help="Peak lr; with --extend, that of it")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of everything random")] = None,
    workers: Workers = None,
    model: Annotated[str | None, typer.Option(help="A timm model's name")] = None,
    precision: Annotated[str | None, typer.Option(help="auto, fp32 or bf16")] = None,
    threads: Annotated[int | None, typer.Option(help="Threads that compute on a CPU")] = None,
    compile: Annotated[
        bool | None, typer.Option("--compile/--no-compile", help="torch.compile the model")
    ] = None,
    resume: Annotated[
        Path | None, typer.Option(help="Begin from this checkpoint, or run, in a new --out")
    ] = None,
    no_resume: Annotated[
        bool, typer.Option("--no-resume", help="Start over; a run in the way is renamed")
    ] = False,
    extend: Annotated[
        float | None, typer.Option(help="Train so many epochs more after the planned end")
    ] = None,
    rebase: Annotated[
        bool, typer.Option("--rebase", help="Go on with a changed recipe from here")
    ] = False,
    target_accuracy: Annotated[
        float | None, typer.Option(help="End at the evaluation that reaches this top-1 (%)")
    ] = None,
) -> None:
    """Train a recipe. The same command goes on with a run that was stopped."""
    from pitstop.core.recipe import load_recipe

    stated: dict[str, Any] = {
        "epochs": epochs,
        "batch_size": batch_size,
        "lr": lr if extend is None else None,
        "seed": seed,
        "model.name": model,
        "precision": precision,
        "compile": compile,
        "threads": threads,
        "target_accuracy": target_accuracy,
        "data": data,
    }
    overrides = {key: value for key, value in stated.items() if value is not None}
    loaded = load_recipe(recipe, overrides | parse_sets(set_))
    if loaded.data is None:
        raise InputError(f"recipe {loaded.name} names no data: give --data")
    for option, number in (("--extend", extend), ("--lr", lr)):
        if number is not None and not 0 < number < math.inf:
            raise InputError(f"{option} {number:g}: must be more than 0, and finite")
    if resume is not None and no_resume:
        raise InputError("--resume and --no-resume exclude each other")

    from pitstop.engine.resume import Wish
    from pitstop.engine.run import run_training

    wish = Wish(loaded, rebase=rebase, extend_epochs=extend, extend_lr=lr)
    out = out or Path("runs") / loaded.name.replace("/", "-")
    outcome = run_training(wish, out, workers=workers, resume=resume, start_over=no_resume)
    raise typer.Exit(outcome.exit_code)
