"""`pitstop data get`: a known dataset, downloaded and packed."""

from pathlib import Path
from typing import Annotated

import typer

from pitstop.cli.data.selecting import Dst, Force, pack_selected
from pitstop.cli.options import Workers


def get(
    name: Annotated[str, typer.Argument(help="cifar10, flowers102, imagenette, pets, ...")],
    out: Dst,
    root: Annotated[
        Path | None,
        typer.Option(help="Where the download is kept (default: the cache's downloads/)"),
    ] = None,
    force: Force = False,
    workers: Workers = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON")] = False,
) -> int:
    """Download a dataset that torchvision knows, and pack it."""
    from pitstop.data.convert import Settings
    from pitstop.data.pack import QUALITY, SHORT_SIDE
    from pitstop.data.sources.download import downloaded
    from pitstop.io.cache import cache_directory

    source = downloaded(name, root or cache_directory() / "downloads")
    settings = Settings(SHORT_SIDE, QUALITY)
    return pack_selected(source, out, settings, workers=workers, force=force, as_json=as_json)
