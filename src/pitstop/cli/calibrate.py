"""`pitstop calibrate`: this machine's rates, for `pitstop plan --machine local`."""

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from pitstop.cli.options import Data, RecipeName, Set, parse_sets

if TYPE_CHECKING:
    from pitstop.plan.calibration import Calibration


def calibrate(
    context: typer.Context,
    recipe: RecipeName = "demo",
    data: Data = None,
    set_: Set = None,
    nproc: Annotated[
        int | None, typer.Option(min=1, help="Ranks on this machine (default: a rank a GPU)")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON")] = False,
) -> None:
    """Measure this machine at what a recipe does, in about a minute; nothing else should run."""
    started = time.perf_counter()
    from pitstop.core.recipe import load_recipe

    loaded = load_recipe(recipe, ({} if data is None else {"data": data}) | parse_sets(set_))

    from pitstop.cli.launching import launch_ranks
    from pitstop.launch.local import Nodes

    code = launch_ranks(
        context.obj, nproc=nproc, nodes=Nodes(), device=loaded.device, max_restarts=0
    )
    if code is not None:
        raise typer.Exit(code)

    from pitstop.engine.run import run_calibration
    from pitstop.plan.calibration import save

    measured = run_calibration(loaded, started)
    if measured is None:
        return
    path = save(measured)
    if as_json:
        typer.echo(measured.model_dump_json(indent=2))
        return
    for line in _lines(measured):
        typer.echo(line)
    typer.echo(f"kept in {path}: `pitstop plan RECIPE --machine local` goes by it")


def _lines(measured: "Calibration") -> Iterator[str]:
    yield f"{measured.device}, {measured.memory_gib:g} GiB of memory"
    for what, speeds in (("training", measured.training), ("evaluation", measured.evaluation)):
        for speed in speeds:
            yield (
                f"  {what:10} {speed.images_per_second:9,.1f} images/s  {speed.model} at "
                f"{speed.resolution} px, batches of {speed.batch_size}, {speed.precision}"
            )
    for decode in measured.decode:
        rate = decode.images_per_second_a_core
        yield (
            f"  {'loading':10} {rate:9,.1f} images/s  on each of {measured.cores} cores, from "
            f"{decode.stored} to {decode.resolution} px"
        )
    yield f"  {'disk':10} {measured.disk_mb_per_second:9,.1f} MB/s"
    yield f"  {'start':10} {measured.startup_seconds:9,.1f} s         to the first step"
    yield f"  {'save':10} {measured.save_seconds:9,.3f} s         that training stands still"
