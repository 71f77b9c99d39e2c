"""`pitstop export`: a trained model in the form that others read."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast, get_args

import typer

from pitstop.cli.options import note
from pitstop.core.errors import InputError

if TYPE_CHECKING:
    from pitstop.engine.export import Format


def export(
    run: Annotated[
        str,
        typer.Argument(
            metavar="RUN", help="A run directory or its URL, or a .safetensors file of one"
        ),
    ],
    format: Annotated[str, typer.Option(help="safetensors, onnx, torch or timm (a folder)")],
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            metavar="DIR|FILE",
            help="A file, or a folder for it (default: named after the run, here)",
        ),
    ] = None,
    last: Annotated[
        bool, typer.Option("--last", help="Of a run, the last weights instead of the best")
    ] = False,
) -> None:
    """Write a trained model for others; it is read again, and its logits are compared."""
    from pitstop.engine.export import Format, export
    from pitstop.io.fetch import place_of

    if format not in get_args(Format):
        raise InputError(f"--format {format}: write one of {', '.join(get_args(Format))}")
    which = "last" if last else "best"
    done = export(place_of(run, note), cast("Format", format), out, which=which)
    typer.echo(
        f"wrote {done.path}: read again by a process of its own, its logits differ from the "
        f"original's by {done.difference:.1e} of the largest"
    )
