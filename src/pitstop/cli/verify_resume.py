"""`pitstop verify-resume`: does a killed run end as one that nobody touches."""

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pitstop.cli.options import Data, RecipeName, Set, parse_sets
from pitstop.core.errors import InputError

if TYPE_CHECKING:
    from pitstop.engine.verify import Verdict

DIFFERENT = 1
"""The exit code when the runs are not equal."""


def verify_resume(
    recipe: RecipeName = "demo",
    data: Data = None,
    kills: Annotated[int, typer.Option(min=1, help="How often the run is killed")] = 5,
    seed: Annotated[int, typer.Option(help="Of the times of the kills")] = 0,
    nproc: Annotated[int, typer.Option(min=1, help="Ranks on this machine")] = 1,
    epochs: Annotated[float | None, typer.Option(help="Epochs of the whole run")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda or mps")] = None,
    set_: Set = None,
    out: Annotated[
        Path | None, typer.Option(help="Keep both runs here (default: a temporary directory)")
    ] = None,
) -> None:
    """Train twice, once killed at random times, and compare ids and weights bit by bit.

    Exit code 0 only when all is equal, 1 when something is not.
    """
    from pitstop.cli.launching import RANK
    from pitstop.core.recipe import load_recipe

    stated = {"data": data, "epochs": epochs, "device": device}
    overrides = {key: value for key, value in stated.items() if value is not None}
    loaded = load_recipe(recipe, overrides | parse_sets(set_))
    if loaded.data is None:
        raise InputError(f"recipe {loaded.name} names no data: give --data")

    from pitstop.engine import verify

    options = [word for key, value in overrides.items() for word in (f"--{key}", str(value))]
    options += [word for item in set_ or [] for word in ("--set", item)]
    options += ["--max-fruitless-starts", "0", "--nproc", str(nproc)]
    options += [] if loaded.device == "cpu" else ["--deterministic"]
    command = [*RANK, "train", recipe, *options]
    with tempfile.TemporaryDirectory(prefix="pitstop-") as scratch:
        place = out or Path(scratch) / "runs"
        verdict = verify.verify_resume(command, place, kills=kills, seed=seed, say=typer.echo)
        typer.echo("\n".join(lines(verdict)))
    raise typer.Exit(0 if verdict.equal else DIFFERENT)


def lines(verdict: "Verdict") -> list[str]:
    """Returns a verdict as text."""
    extra = verdict.seconds_killed - verdict.seconds
    said = [
        f"{verdict.kills} kills; without them {verdict.seconds:.1f} s, with them {extra:.1f} s "
        f"more; {verdict.lost_steps} steps were trained again"
    ]
    if verdict.equal:
        return [*said, "EQUAL: ids, accuracies and all tensors, bit by bit"]
    return [*said, "NOT EQUAL:", *(f"  {line}" for line in verdict.differences)]
