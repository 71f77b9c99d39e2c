"""`pitstop eval`: the accuracy of weights, exactly, with its protocol."""

import csv
import io
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pitstop.cli.options import Workers, note
from pitstop.core.errors import InputError

if TYPE_CHECKING:
    from pitstop.engine.predict import Assessment

FIGURES = {
    "top1": "top1 {:.2f}%",
    "top5": "top5 {:.2f}%",
    "loss": "loss {:.4f}",
    "ece": "ECE {:.2f}%",
}
"""The figures of a result, as they are printed."""


def evaluate(
    weights: Annotated[
        str,
        typer.Argument(help="A run directory or its URL, or a .safetensors file of one"),
    ],
    data: Annotated[
        str | None, typer.Option(help="What to evaluate on (default: the run's data)")
    ] = None,
    last: Annotated[
        bool, typer.Option("--last", help="Of a run, the last weights instead of the best")
    ] = False,
    resolution: Annotated[
        str | None, typer.Option(metavar="PIXELS[,...]", help="One, or several: 224,256")
    ] = None,
    crop_ratio: Annotated[float | None, typer.Option(help="Crop over short side")] = None,
    flip_average: Annotated[
        bool | None, typer.Option("--flip-average/--no-flip-average", help="Average with a mirror")
    ] = None,
    translate_average: Annotated[
        int | None, typer.Option(min=0, help="Average with the image so many pixels away")
    ] = None,
    precision: Annotated[
        str | None, typer.Option(help="auto, fp32, bf16 or fp16 (default: as it was trained)")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or mps")] = "auto",
    workers: Workers = None,
    confusion: Annotated[
        Path | None,
        typer.Option(help="Write which class was taken for which, at the first resolution"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON")] = False,
) -> None:
    """Evaluate weights on the validation images of a dataset."""
    first, *others = _sides(resolution)
    stated = {
        "crop_ratio": crop_ratio,
        "flip_average": flip_average,
        "translate_average": translate_average,
    }

    from pitstop.engine.predict import examine
    from pitstop.io.fetch import place_of

    place = place_of(weights, note)
    which = "last" if last else "best"
    options: dict[str, Any] = {"precision": precision, "device": device, "workers": workers}

    def protocol(side: int | None) -> dict[str, Any]:
        wanted = {"resolution": side, **stated}
        return {key: value for key, value in wanted.items() if value is not None}

    def measured(side: int | None) -> "Assessment":
        return examine(place, data, which=which, protocol=protocol(side), **options)

    examined = measured(first)
    if confusion is not None:
        _write_confusion(examined, confusion)
    result = asdict(examined.evaluation)
    result["also"] = [*result["also"], *(asdict(measured(side).evaluation) for side in others)]
    if as_json:
        typer.echo(json.dumps(result, indent=2))
        return
    for each in (result, *result["also"]):
        typer.echo("  ".join(form.format(each[key]) for key, form in FIGURES.items()))
        typer.echo(", ".join(f"{key} {value}" for key, value in each["protocol"].items()))


def _sides(stated: str | None) -> list[int | None]:
    """Returns the resolutions to evaluate at; None is the run's own."""
    if stated is None:
        return [None]
    parts = [part.strip() for part in stated.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise InputError(f"--resolution {stated}: write pixels, with commas between: 224,256")
    return [int(part) for part in parts]


def _write_confusion(examined: "Assessment", path: Path) -> None:
    """Writes how many images of each class, a row, were taken for each, a column."""
    from pitstop.io.storage import write_text

    out = io.StringIO()
    table = csv.writer(out, lineterminator="\n")
    table.writerow(["true class", *examined.classes])
    for name, row in zip(examined.classes, examined.confusion().tolist(), strict=True):
        table.writerow([name, *row])
    write_text(path, out.getvalue())
