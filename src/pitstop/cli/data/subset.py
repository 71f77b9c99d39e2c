"""`pitstop data subset`: some classes, and some images of each."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pitstop.cli.data.selecting import Dst, Force, Src, pack_selected, source_of
from pitstop.cli.options import Workers
from pitstop.core.errors import InputError

if TYPE_CHECKING:
    from pitstop.data.sources.base import Source


def subset(
    source: Src,
    out: Dst,
    classes: Annotated[
        str | None,
        typer.Option(
            metavar="N|NAME,NAME|@FILE",
            help="The first N, these, or those in a file, a line each (default: all)",
        ),
    ] = None,
    train: Annotated[
        int | None, typer.Option(min=1, help="Training images a class (default: all)")
    ] = None,
    val: Annotated[
        int | None, typer.Option(min=1, help="Validation images a class (default: all)")
    ] = None,
    force: Force = False,
    workers: Workers = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON")] = False,
) -> int:
    """Take some classes and some images of each, the same ones each time."""
    from pitstop.data.sources.select import subset_source

    if classes is None and train is None and val is None:
        raise InputError("nothing to leave out: give --classes, --train or --val")
    found, settings = source_of(source, out)
    chosen = found.classes if classes is None else _chosen(found, classes)
    selected = subset_source(found, chosen, train=train, val=val)
    return pack_selected(selected, out, settings, workers=workers, force=force, as_json=as_json)


def _chosen(source: "Source", classes: str) -> tuple[str, ...]:
    """Returns the names of the classes that `--classes` means."""
    if classes.startswith("@"):
        try:
            lines = Path(classes[1:]).read_text().splitlines()
        except OSError as error:
            raise InputError(f"--classes {classes}: cannot be read ({error.strerror})") from None
        except UnicodeDecodeError:
            raise InputError(f"--classes {classes}: is no text file") from None
        return tuple(line.strip() for line in lines if line.strip())
    if not classes.isdecimal():
        return tuple(name.strip() for name in classes.split(",") if name.strip())
    count, there = int(classes), len(source.classes)
    if not 2 <= count <= there:
        raise InputError(f"--classes {count}: write a number from 2 to {there}")
    return source.classes[:count]
