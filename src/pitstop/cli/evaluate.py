"""`pitstop eval`: the accuracy of weights, exactly, with its protocol."""

import json
from pathlib import Path
from typing import Annotated

import typer

from pitstop.cli.options import Workers


def evaluate(
    weights: Annotated[Path, typer.Argument(help="A run directory, or a .safetensors file of one")],
    data: Annotated[
        str | None, typer.Option(help="What to evaluate on (default: the run's data)")
    ] = None,
    last: Annotated[
        bool, typer.Option("--last", help="Of a run, the last weights instead of the best")
    ] = False,
    resolution: Annotated[int | None, typer.Option(min=1, help="Pixels")] = None,
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
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON")] = False,
) -> None:
    """Evaluate weights on the validation images of a dataset."""
    from pitstop.engine.run import run_evaluation

    stated = {
        "resolution": resolution,
        "crop_ratio": crop_ratio,
        "flip_average": flip_average,
        "translate_average": translate_average,
    }
    protocol = {key: value for key, value in stated.items() if value is not None}
    result = run_evaluation(
        weights,
        data,
        which="last" if last else "best",
        protocol=protocol,
        precision=precision,
        device=device,
        workers=workers,
    )
    if as_json:
        typer.echo(json.dumps(result, indent=2))
        return
    for each in (result, *result["also"]):
        typer.echo(f"top1 {each['top1']:.2f}%  top5 {each['top5']:.2f}%  loss {each['loss']:.4f}")
        typer.echo(", ".join(f"{key} {value}" for key, value in each["protocol"].items()))
