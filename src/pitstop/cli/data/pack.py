"""`pitstop data pack`: any source of images becomes a packed dataset."""

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from pitstop.cli.data.packing import pack_with_progress
from pitstop.cli.data.selecting import Dst, Force
from pitstop.core.errors import InputError
from pitstop.core.exit_codes import FINISHED

if TYPE_CHECKING:
    from pitstop.data.pack import PackReport


def pack(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SRC", help="A class folder, tar or Parquet files, s3://..., hf://OWNER/NAME"
        ),
    ],
    out: Dst,
    short_side: Annotated[
        str,
        typer.Option(metavar="PIXELS|original", help="Shrink larger training images to it"),
    ] = "400",
    quality: Annotated[
        int, typer.Option(min=1, max=100, help="Of the JPEGs that are written")
    ] = 90,
    levels: Annotated[
        str,
        typer.Option(
            metavar="PIXELS,PIXELS",
            help="Short sides of small copies of the training images, for low resolutions: 160,256",
        ),
    ] = "",
    on_bad: Annotated[
        Literal["skip", "fail"],
        typer.Option(help="Skip and list bad images (more than 0.1% fail), or fail at any"),
    ] = "skip",
    force: Force = False,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Processes that convert (default: all cores)")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON")] = False,
) -> int:
    """Pack images into one fast dataset. The same command goes on after a kill."""
    from pitstop.data.convert import Settings
    from pitstop.data.resolve import resolve

    settings = Settings(_short_side(short_side), quality, tuple(_levels(levels)))
    found = resolve(source)
    if isinstance(found, Path):
        raise InputError(f"{source} is a packed dataset: name what it was made of")
    started = time.monotonic()
    report = pack_with_progress(found, out, settings, on_bad=on_bad, workers=workers, force=force)
    facts = _facts(out, report, time.monotonic() - started)
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
    else:
        for line in _lines(facts):
            typer.echo(line)
    return FINISHED


def _short_side(text: str) -> int | None:
    return None if text == "original" else _pixels("--short-side", text, "pixels, or original")


def _levels(text: str) -> list[int]:
    stated = [part.strip() for part in text.split(",")] if text else []
    return [_pixels("--levels", part, "pixels: 160,256") for part in stated]


def _pixels(option: str, text: str, fix: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise InputError(f"{option} {text or '(nothing)'}: write it in {fix}")
    return int(text)


def _facts(out: Path, report: "PackReport | None", seconds: float) -> dict[str, Any]:
    """Returns what came of it, ready for JSON: of a dataset that was there, what it is."""
    from pitstop.data.manifest import REMARKS, read_manifest

    manifest = read_manifest(out)
    splits = manifest["splits"]
    entries = [*splits.values(), *splits["train"].get("levels", {}).values()]
    facts = {
        "path": str(out),
        "digest": manifest["digest"],
        "classes": len(manifest["classes"]),
        "train": splits["train"]["rows"],
        "val": splits["val"]["rows"],
        "bytes": sum(shard["bytes"] for entry in entries for shard in entry["shards"]),
        "skipped": manifest["skipped"],
        "converted": sum(manifest["converted"].values()),
        "remarks": str(out / REMARKS),
        "already_packed": report is None,
    }
    if report is None:
        return facts
    done = report.train + report.val + len(report.skipped) - report.resumed
    return facts | {
        "resumed": report.resumed,
        "seconds": round(seconds, 3),
        "images_per_second": round(done / seconds, 1),
    }


def _lines(facts: dict[str, Any]) -> list[str]:
    """Returns what the user is told."""
    count = f"{facts['train']:,} training and {facts['val']:,} validation images"
    what = f"{count} of {facts['classes']:,} classes, {facts['bytes'] / 1e6:,.1f} MB"
    if facts["already_packed"]:
        return [f"{facts['path']} is packed already: {what}"]
    lines = [
        f"packed {what} into {facts['path']} "
        f"in {facts['seconds']:,.1f} s ({facts['images_per_second']:,.0f} images/s)"
    ]
    if facts["resumed"]:
        lines.append(f"went on behind {facts['resumed']:,} images that were packed before")
    for what in ("converted", "skipped"):
        if facts[what]:
            lines.append(f"{what} {facts[what]:,} images: see {facts['remarks']}")
    return lines
