"""`pitstop data split`: divides images into train and val anew."""

from typing import Annotated

import typer

from pitstop.cli.data.selecting import Dst, Force, Src, pack_selected, source_of
from pitstop.cli.options import Workers
from pitstop.core.errors import InputError


def split(
    source: Src,
    out: Dst,
    val: Annotated[float, typer.Option(help="The part of each class that is for validation")] = 0.1,
    seed: Annotated[int, typer.Option(min=0, max=2**31, help="Another one takes others")] = 0,
    every: Annotated[
        bool, typer.Option("--all", help="Divide SRC's validation images too")
    ] = False,
    force: Force = False,
    workers: Workers = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON")] = False,
) -> int:
    """Take a part of each class's training images for validation, the same ones each time."""
    from pitstop.data.sources.select import split_source

    if not 0 < val < 1:
        raise InputError(f"--val {val:g}: write a part between 0 and 1, such as 0.1")
    found, settings = source_of(source, out)
    divided = split_source(found, val, seed=seed, every=every)
    return pack_selected(divided, out, settings, workers=workers, force=force, as_json=as_json)
