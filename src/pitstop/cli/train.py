"""`pitstop train`."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pitstop.cli.options import Data, RecipeName, Set, Workers, parse_sets
from pitstop.core.errors import InputError

if TYPE_CHECKING:  # it takes its time
    from pitstop.core.safeguards import Safeguards
    from pitstop.core.tracking import Tracking


def train(
    context: typer.Context,
    recipe: RecipeName = "demo",
    data: Data = None,
    out: Annotated[
        Path | None, typer.Option(help="The run directory (default: runs/RECIPE)")
    ] = None,
    set_: Set = None,
    epochs: Annotated[float | None, typer.Option(help="Epochs of the whole run")] = None,
    minutes: Annotated[
        float | None,
        typer.Option(help="Train as many epochs as fit, by this machine's speed, measured once"),
    ] = None,
    batch_size: Annotated[
        str | None,
        typer.Option(
            metavar="N|auto",
            help="Images a step, over all ranks; auto: the recipe's, in micro-batches that fit",
        ),
    ] = None,
    lr: Annotated[float | None, typer.Option(help="Peak lr; with --extend, that of it")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of everything random")] = None,
    workers: Workers = None,
    model: Annotated[str | None, typer.Option(help="A timm model's name")] = None,
    precision: Annotated[str | None, typer.Option(help="auto, fp32, bf16 or fp16")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda or mps")] = None,
    threads: Annotated[int | None, typer.Option(help="Threads that compute on a CPU")] = None,
    compile: Annotated[
        bool | None, typer.Option("--compile/--no-compile", help="torch.compile the model")
    ] = None,
    deterministic: Annotated[
        bool | None, typer.Option("--deterministic", help="Same bits on each run, on a GPU too")
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
    nproc: Annotated[
        int | None, typer.Option(min=1, help="Ranks on this machine (default: a rank a GPU)")
    ] = None,
    nodes: Annotated[int, typer.Option(min=1, help="Machines that train together")] = 1,
    node_rank: Annotated[
        int | None, typer.Option(help="This machine's number; 0 is the one at --rdzv-endpoint")
    ] = None,
    rdzv_endpoint: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="One of the machines, where all meet")
    ] = None,
    max_restarts: Annotated[
        int, typer.Option(min=0, help="How often all ranks start again after one failed")
    ] = 0,
    rank_timeout: Annotated[
        int,
        typer.Option(min=1, help="A rank that does not answer for so many seconds is given up"),
    ] = 300,
    remote: Annotated[
        str | None,
        typer.Option(metavar="URL", help="Keep a copy of the run in a bucket (s3, gs, az)"),
    ] = None,
    max_durable_age: Annotated[
        float | None,
        typer.Option(metavar="MINUTES", help="End when nothing got to the bucket for so long"),
    ] = None,
    price: Annotated[
        float | None, typer.Option(min=0, help="Dollars an hour, of all machines together")
    ] = None,
    max_cost: Annotated[
        float | None, typer.Option(min=0, help="End, saved, when all starts have cost so much ($)")
    ] = None,
    max_fruitless_starts: Annotated[
        int, typer.Option(min=0, help="So many in a row may save nothing; 0 is any number")
    ] = 5,
    preemption_file: Annotated[
        Path | None, typer.Option(help="Save and stop when this file appears")
    ] = None,
    preemption_command: Annotated[
        str | None,
        typer.Option(metavar="COMMAND", help="Save and stop when it exits with 0; tried every 5 s"),
    ] = None,
    track: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME,...", help="Send the figures to wandb, tensorboard, mlflow too"),
    ] = None,
    track_project: Annotated[
        str | None, typer.Option(help="wandb's project, mlflow's experiment (default: pitstop)")
    ] = None,
    track_name: Annotated[
        str | None, typer.Option(help="The run's name there (default: that of its directory)")
    ] = None,
) -> None:
    """Train a recipe. The same command goes on with a run that was stopped."""
    from pitstop.core.recipe import load_recipe

    asked = context.params
    overrides = recipe_overrides(asked)
    loaded = load_recipe(recipe, overrides)
    safeguards, tracking = checked(asked, overrides)
    if loaded.data is None:
        raise InputError(f"recipe {loaded.name} names no data: give --data")

    from pitstop.cli.launching import launch_ranks
    from pitstop.launch.local import Nodes

    code = launch_ranks(
        context.obj,
        nproc=nproc,
        nodes=Nodes(nodes, node_rank, rdzv_endpoint),
        device=loaded.device,
        max_restarts=max_restarts,
    )
    if code is not None:
        raise typer.Exit(code)

    from pitstop.engine.resume import TimeLimit, Wish
    from pitstop.engine.run import run_training

    limit = None
    if minutes is not None:
        limit = TimeLimit(
            minutes, lambda epochs: load_recipe(recipe, {**overrides, "epochs": epochs})
        )
    wish = Wish(
        loaded,
        rebase=rebase,
        extend_epochs=extend,
        extend_lr=lr,
        fit_memory=batch_size == "auto",
        limit=limit,
    )
    out = out or Path("runs") / loaded.name.replace("/", "-")
    outcome = run_training(
        wish,
        out,
        resume=resume,
        start_over=no_resume,
        rank_timeout=rank_timeout,
        safeguards=safeguards,
        tracking=tracking,
    )
    raise typer.Exit(outcome.exit_code)


RECIPE_KEYS = {
    "epochs": "epochs",
    "batch_size": "batch_size",
    "lr": "lr",
    "seed": "seed",
    "model": "model.name",
    "precision": "precision",
    "device": "device",
    "compile": "compile",
    "deterministic": "deterministic",
    "threads": "threads",
    "workers": "workers",
    "target_accuracy": "target_accuracy",
    "data": "data",
}
"""Parameters of `train` that are keys of the recipe."""


def recipe_overrides(asked: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the keys of the recipe that the parameters of `train` change.

    Raises:
        InputError: `--batch-size` or a `--set` is none.
    """
    stated = {key: asked[name] for name, key in RECIPE_KEYS.items() if asked[name] is not None}
    if stated.get("batch_size") == "auto":
        del stated["batch_size"]
    elif "batch_size" in stated:
        stated["batch_size"] = _images(stated["batch_size"])
    if asked["extend"] is not None:
        stated.pop("lr", None)  # it is that of the extension
    return stated | parse_sets(asked["set_"])


def checked(
    asked: Mapping[str, Any], overrides: Mapping[str, Any]
) -> "tuple[Safeguards, Tracking]":
    """Returns the safeguards and trackers that the parameters of `train` ask for.

    Raises:
        InputError: two of the parameters contradict each other, or one is out of its range.
    """
    from pitstop.core.safeguards import Safeguards
    from pitstop.core.tracking import Tracking, parse_trackers

    beside = {
        "--epochs": "epochs" in overrides,
        "--extend": asked["extend"] is not None,
        "--rebase": asked["rebase"],
    }
    for option, given in beside.items():
        if given and asked["minutes"] is not None:
            raise InputError(
                f"--minutes and {option} exclude each other: --minutes sets the epochs"
            )
    for name in ("extend", "lr", "minutes"):
        number = asked[name]
        if number is not None and not 0 < number < math.inf:
            raise InputError(f"--{name} {number:g}: must be more than 0, and finite")
    if asked["resume"] is not None and asked["no_resume"]:
        raise InputError("--resume and --no-resume exclude each other")
    tracking = Tracking(
        parse_trackers(asked["track"] or ()), asked["track_project"], asked["track_name"]
    )
    safeguards = Safeguards(
        remote=asked["remote"],
        max_durable_age=asked["max_durable_age"],
        price=asked["price"],
        max_cost=asked["max_cost"],
        max_fruitless_starts=asked["max_fruitless_starts"] or None,
        preemption_file=asked["preemption_file"],
        preemption_command=asked["preemption_command"],
    )
    return safeguards, tracking


def _images(stated: str) -> int:
    """Returns `--batch-size` as a number."""
    try:
        return int(stated)
    except ValueError:
        raise InputError(f"--batch-size {stated}: give a number of images, or auto") from None
