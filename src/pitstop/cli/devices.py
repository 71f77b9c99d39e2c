"""`pitstop devices`: what this machine has, and what a training here would use."""

import json
from typing import Annotated, Any, get_args

import typer

from pitstop.core.errors import InputError


def devices(
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or mps")] = "auto",
    precision: Annotated[str, typer.Option(help="auto, fp32, bf16 or fp16")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON")] = False,
) -> None:
    """Show what this machine has, and what `pitstop train` would use of it."""
    from pitstop.runtime.devices import Kind, Precision, machine, training

    for option, value, known in (("device", device, Kind), ("precision", precision, Precision)):
        if value not in get_args(known):
            raise InputError(f"--{option} {value}: write one of {', '.join(get_args(known))}")
    there, used = machine(), training(device, precision)  # pyright: ignore[reportArgumentType]
    if as_json:
        plain = {name: {"value": value, "why": why} for name, (value, why) in used.items()}
        typer.echo(json.dumps({"machine": there, "training": plain}, indent=2))
    else:
        _print(there, used)


def _print(there: dict[str, Any], used: dict[str, tuple[Any, str]]) -> None:
    typer.echo("this machine")
    for i, gpu in enumerate(there["gpus"]):
        about = f"{gpu['memory_gib']} GiB, compute capability {gpu['capability']}"
        typer.echo(f"  {f'GPU {i}':16} {gpu['name']}, {about}")
    if there["mps"]:
        typer.echo(f"  {'GPU':16} of this Mac")
    cpu = there["cpu"]
    bf16 = f"bf16 by {cpu['bf16']}" if cpu["bf16"] else "no bf16"
    typer.echo(f"  {'processor':16} {cpu['name']}, {cpu['cores']} cores to use, {bf16}")
    typer.echo(f"  {'memory':16} {there['ram_gib']} GiB")
    typer.echo("`pitstop train` here")
    labels = {"threads": "threads a rank", "workers": "decoders a rank"}
    for name, (value, why) in used.items():
        shown = "off" if value is False else str(value)
        typer.echo(f"  {labels.get(name, name):16} {shown:8} {why}")
