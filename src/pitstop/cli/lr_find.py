"""`pitstop lr-find`: the learning rate that a range test suggests."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from pitstop.cli.options import Data, RecipeName, Set, Workers, parse_sets
from pitstop.core.errors import InputError


def lr_find(
    recipe: RecipeName = "demo",
    data: Data = None,
    set_: Set = None,
    iterations: Annotated[int | None, typer.Option(help="Steps of the test")] = None,
    start_lr: Annotated[float | None, typer.Option(help="The lr of the first")] = None,
    end_lr: Annotated[float | None, typer.Option(help="The lr of the last")] = None,
    policy: Annotated[str | None, typer.Option(help="min0.1, steepest or valley")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda or mps")] = None,
    workers: Workers = None,
    csv: Annotated[Path | None, typer.Option(help="Write the curve into this CSV")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the curve into this PNG")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON")] = False,
) -> None:
    """Find a learning rate: train with a rising one, and look where the loss falls.

    The images, batches and augmentation are those that training begins with. No run is written.
    """
    from pitstop.core.recipe import load_recipe

    stated: dict[str, Any] = {"data": data, "device": device, "workers": workers}
    stated = {key: value for key, value in stated.items() if value is not None}
    stated |= parse_sets(set_)
    tested: dict[str, Any] = {
        "lr_finder.iterations": iterations,
        "lr_finder.start_lr": start_lr,
        "lr_finder.end_lr": end_lr,
        "lr_finder.policy": policy,
    }
    tested = {key: value for key, value in tested.items() if value is not None}
    loaded = load_recipe(recipe, stated)
    if loaded.lr_finder is None:
        tested = {"lr_finder": {"fallback": loaded.phases[0].peak_lr()}, **tested}
    loaded = load_recipe(recipe, stated | tested)
    if loaded.data is None:
        raise InputError(f"recipe {loaded.name} names no data: give --data")
    for option, file in (("--csv", csv), ("--plot", plot)):
        if file is not None and file.is_dir():
            raise InputError(f"{option} {file}: is a directory: name a file")

    from pitstop.engine.lr_finder import write_curve
    from pitstop.engine.run import run_lr_search

    assert loaded.lr_finder is not None
    found = run_lr_search(loaded, loaded.lr_finder)
    if as_json:
        typer.echo(json.dumps(found.as_record(), indent=2))
    else:
        typer.echo(found.explained())
        typer.echo(
            f"{found.spec.policy}, {len(found.losses)} of {found.spec.iterations} iterations, "
            f"lr {found.lrs[0]:.3g} to {found.lrs[-1]:.3g}"
        )
    try:
        if csv is not None:
            write_curve(csv, found)
        if plot is not None:
            from pitstop.report.lr_curve import draw

            draw(found.as_record(), plot)
    except OSError as error:
        raise InputError(f"{error.filename}: cannot be written: {error.strerror}") from None
