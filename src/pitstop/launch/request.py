"""What is to be trained, wherever: what all launchers are given, and what they say before they act.

A recipe travels as the user wrote it, laid over those that it extends, and the options of `train`
travel word by word: the machine far away computes from them what this one would have.
"""

import re
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from pitstop.core.errors import InputError
from pitstop.core.recipe import Recipe, find_recipe, read_raw

if TYPE_CHECKING:
    from pitstop.plan.cost import Estimate

RUN_NAME = re.compile(r"[a-zA-Z][a-zA-Z0-9]*(-[a-zA-Z0-9]+)*")
"""What SageMaker, the tags of EC2, SkyPilot and the keys of a bucket all take."""

LONGEST_NAME = 63

NOT_A_PATH = ("timm", "digits")
"""What `model.weights` and `data` may be besides a path and a URL."""


@dataclass(frozen=True)
class Request:
    """What to train, and on how many machines.

    Raises:
        InputError: the name is none that all services take.
    """

    name: str
    """Of the run."""
    recipe: Recipe
    """With the options of `train` applied: for prices and checks."""
    recipe_name: str
    """As it was given: a bundled recipe's name, or a YAML file."""
    data: str | None
    """`--data`, else that of the recipe; None where the launcher has another way to name it."""
    train_options: tuple[str, ...] = ()
    """Those of `train` that are not the launcher's own, word by word; `train` accepts them."""
    spot: bool = False
    nodes: int = 1
    remote: str | None = None
    """`--remote`: the folder of a bucket in which the run is kept."""
    estimate: "Estimate | None" = None

    def __post_init__(self) -> None:
        if not RUN_NAME.fullmatch(self.name) or len(self.name) > LONGEST_NAME:
            raise InputError(
                f"--name {self.name}: begin with a letter; letters, digits and single hyphens "
                f"between them, at most {LONGEST_NAME}"
            )


def default_name(recipe_name: str, now: float | None = None) -> str:
    """Returns RECIPE-YYYYmmdd-HHMMSS (UTC) of a time in seconds since the epoch, now by default."""
    stem = Path(recipe_name).stem if recipe_name.endswith((".yaml", ".yml")) else recipe_name
    words = re.findall("[a-zA-Z0-9]+", stem)
    if not words or not words[0][0].isalpha():
        words.insert(0, "run")
    when = time.strftime("%Y%m%d-%H%M%S", time.gmtime(now))
    readable = "-".join(words)[: LONGEST_NAME - len(when) - 1].rstrip("-")
    return f"{readable}-{when}"


def recipe_yaml(recipe_name: str) -> str:
    """Returns a recipe as YAML that needs no other file; what it leaves open stays open.

    Its durations stay relative, so that `--epochs` and `--minutes` mean there what they mean here.

    Raises:
        InputError: there is no such recipe.
    """
    path = find_recipe(recipe_name)
    raw = {"name": path.stem, **read_raw(path)}
    return yaml.safe_dump(raw, sort_keys=False, allow_unicode=True)


def train_command(
    train_options: Sequence[str],
    *,
    recipe: str,
    data: str | None,
    out: str,
    remote: str | None = None,
    resume: str | None = None,
    nproc: int | None = None,
    nodes: int = 1,
    node_rank: int | None = None,
    endpoint: str | None = None,
    max_restarts: int | None = None,
) -> list[str]:
    """Returns the arguments of pitstop that train, and go on with a run that was stopped.

    Of an option that is given twice the last one counts: the user's own.

    Args:
        train_options: those of the request.
        recipe: its name, or its file on the machine that trains.
        data, out, remote, resume, nproc, nodes, max_restarts: as of `train`; None is its default.
        node_rank, endpoint: `--node-rank` and `--rdzv-endpoint`, where there are several nodes.
    """
    stated = {
        "--data": data,
        "--out": out,
        "--remote": remote,
        "--resume": resume,
        "--nproc": nproc,
        "--nodes": nodes if nodes > 1 else None,
        "--node-rank": node_rank,
        "--rdzv-endpoint": endpoint,
        "--max-restarts": max_restarts,
    }
    given = [(option, str(value)) for option, value in stated.items() if value is not None]
    return ["train", recipe, *(word for pair in given for word in pair), *train_options]


def refuse_local_files(request: Request) -> None:
    """Raises InputError when the data, or the weights to begin with, are only on this machine.

    An absolute path that does not exist here is taken to exist there.
    """
    places = {"--data": request.data, "model.weights": request.recipe.model.weights}
    for key, place in places.items():
        if place is not None and _is_here(place):
            raise InputError(
                f"{key} {place}: is on this machine, not on the one that trains: put it into a "
                "bucket and give its URL"
            )


def _is_here(place: str) -> bool:
    if "://" in place or place in NOT_A_PATH:
        return False
    path = Path(place).expanduser()
    return not path.is_absolute() or path.exists()


def refuse_unsafe_spot(request: Request, *, kept: str | None) -> None:
    """Raises InputError when a spot machine would take the only checkpoints with it.

    Args:
        kept: where they outlive the machine: a URL or a volume; None where they do not.
    """
    if request.spot and kept is None:
        raise InputError(
            "--spot: the machine may be taken away, and the checkpoints with it: give a place "
            "that outlives it, such as --remote s3://BUCKET/FOLDER"
        )


def cost_lines(estimate: "Estimate | None") -> list[str]:
    """Returns what a run is expected to take and cost, to be printed before it is launched."""
    if estimate is None:
        return ["time and cost: not known (see `pitstop plan`)"]
    machines = f"{estimate.nodes} x " if estimate.nodes > 1 else ""
    kind = "spot" if estimate.spot else "on demand"
    taken = f"expected: {_duration(estimate.minutes)} on {machines}{estimate.machine.name}, {kind}"
    price, dollars = estimate.price, estimate.dollars
    hourly = None if price is None else price.an_hour(spot=estimate.spot)
    if price is None or hourly is None or dollars is None:
        return [f"{taken}; its price is not known (see `pitstop prices`)"]
    return [
        f"{taken}; about ${dollars:.2f}",
        f"at ${hourly:.2f}/h a machine ({price.region}, {price.date}, {price.source}); "
        "storage and transfer are extra",
    ]


def _duration(minutes: float) -> str:
    return f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.1f} h"


def shown(command: Sequence[str]) -> str:
    """Returns a command as a shell takes it."""
    return shlex.join(command)


def ask(lines: Sequence[str], *, yes: bool) -> None:
    """Prints what will be created and what it costs, and asks whether to go on.

    Args:
        yes: `--yes`: it is printed, but not asked.

    Raises:
        InputError: the answer is no, or there is nobody to ask.
    """
    print("\n".join(lines), flush=True)
    if yes:
        return
    if not sys.stdin.isatty():
        raise InputError("nothing was created: nobody is there to ask: give --yes, or --dry-run")
    try:
        answer = input("Go on? [y/N] ")
    except EOFError:
        answer = ""
    if answer.strip().lower() not in ("y", "yes"):
        raise InputError("nothing was created: the answer was no")
