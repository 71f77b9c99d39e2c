"""`pitstop predict`: what a trained model takes images for."""

import csv
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pitstop.cli.options import Workers, note
from pitstop.core.errors import InputError

if TYPE_CHECKING:
    from pitstop.engine.predict import Prediction


def predict(
    run: Annotated[
        str,
        typer.Argument(
            metavar="RUN", help="A run directory or its URL, or a .safetensors file of one"
        ),
    ],
    images: Annotated[
        list[Path],
        typer.Argument(metavar="IMAGE|FOLDER...", help="Images, or folders of them at any depth"),
    ],
    top: Annotated[int, typer.Option(min=1, help="So many classes an image")] = 5,
    as_csv: Annotated[
        bool, typer.Option("--csv", help="Print CSV: file, rank, class, probability")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON")] = False,
    last: Annotated[
        bool, typer.Option("--last", help="Of a run, the last weights instead of the best")
    ] = False,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or mps")] = "auto",
    workers: Workers = None,
) -> None:
    """Say what a trained model takes images for; damaged ones are named and skipped."""
    if as_csv and as_json:
        raise InputError("--csv and --json: take one of them")

    from pitstop.core.machine import cores
    from pitstop.engine.predict import image_files, load, predictions
    from pitstop.io.fetch import place_of

    files = image_files(images)
    trained = load(place_of(run, note), which="last" if last else "best", device=device)
    bad: list[Path] = []

    def skipped(file: Path, why: str) -> None:
        bad.append(file)
        typer.echo(f"skipped {file}: {why}", err=True)

    found = predictions(trained, files, top=top, workers=workers or cores(), skipped=skipped)
    if as_csv:
        _print_csv(found)
    elif as_json:
        _print_json(found)
    else:
        _print_lines(found)
    if len(bad) == len(files):
        raise InputError(f"none of the {len(files):,} images can be read: name others")


def _print_csv(found: Iterable["Prediction"]) -> None:
    table = csv.writer(sys.stdout, lineterminator="\n")
    table.writerow(["file", "rank", "class", "probability"])
    for each in found:
        for rank, (name, probability) in enumerate(each.likeliest, 1):
            table.writerow([each.file, rank, name, f"{probability:.6g}"])


def _print_json(found: Iterable["Prediction"]) -> None:
    listed = [
        {
            "file": str(each.file),
            "predictions": [
                {"class": name, "probability": probability} for name, probability in each.likeliest
            ],
        }
        for each in found
    ]
    typer.echo(json.dumps(listed, indent=2))


def _print_lines(found: Iterable["Prediction"]) -> None:
    for each in found:
        likeliest = "  ".join(f"{name} {100 * chance:.2f}%" for name, chance in each.likeliest)
        typer.echo(f"{each.file}  {likeliest}")
