"""What `split` and `subset` share: any source in, a packed dataset out."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pitstop.cli.data.packing import pack_with_progress
from pitstop.core.errors import InputError
from pitstop.core.exit_codes import FINISHED

if TYPE_CHECKING:
    from pitstop.data.convert import Settings
    from pitstop.data.sources.base import Source

Src = Annotated[
    str, typer.Argument(metavar="SRC", help="A packed dataset, or whatever can be packed")
]
Dst = Annotated[
    Path, typer.Argument(metavar="DST", help="The directory of the packed dataset that is made")
]
Force = Annotated[bool, typer.Option("--force", help="Replace another packed dataset at DST")]


def source_of(spec: str, out: Path) -> "tuple[Source, Settings]":
    """Returns what `spec` names as a source, and the settings of packing that keep its images.

    Those of a packed dataset are its own short side and quality, without levels; otherwise they
    are packing's defaults.

    Raises:
        InputError: `spec` names nothing, or the packed dataset at `out`.
    """
    from pitstop.data.convert import Settings
    from pitstop.data.manifest import read_manifest
    from pitstop.data.pack import QUALITY, SHORT_SIDE
    from pitstop.data.resolve import resolve
    from pitstop.data.sources.packed import packed_source

    named = resolve(spec)
    if not isinstance(named, Path):
        return named, Settings(SHORT_SIDE, QUALITY)
    if named.resolve() == out.resolve():
        raise InputError(f"{out} would replace itself: name another place")
    made = read_manifest(named)["made"]
    return packed_source(named), Settings(made["short_side"], made["quality"])


def pack_selected(
    source: "Source",
    out: Path,
    settings: "Settings",
    *,
    workers: int | None,
    force: bool,
    as_json: bool,
) -> int:
    """Packs a source, says what came of it, and returns the exit code."""
    from pitstop.data.packed import PackedDataset

    report = pack_with_progress(source, out, settings, workers=workers, force=force)
    if report is None:
        typer.echo(f"{out} is there already, made the same way", err=True)
    elif report.skipped:
        typer.echo(f"skipped {len(report.skipped):,} bad images: see {out}/remarks.csv", err=True)
    dataset = PackedDataset.open(out)
    classes, train, val = len(dataset.classes), len(dataset.train), len(dataset.val)
    if as_json:
        answer = {"path": str(out), "classes": classes, "train": train, "val": val}
        typer.echo(json.dumps(answer | {"digest": dataset.digest}, indent=2))
    else:
        typer.echo(
            f"{out}: {train:,} training and {val:,} validation images of {classes:,} classes"
        )
    return FINISHED
