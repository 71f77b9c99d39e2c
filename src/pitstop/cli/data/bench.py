"""`pitstop data bench`: how fast this machine loads, and whether that is enough for a GPU."""

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pitstop.cli.data.progress import image_progress
from pitstop.core.errors import InputError
from pitstop.core.machine import cores

if TYPE_CHECKING:
    from pitstop.data.bench import Bench
    from pitstop.plan.machines import Machine


def bench(
    data: Annotated[str, typer.Argument(help="A dataset; what is not packed is packed first")],
    resolution: Annotated[int, typer.Option(min=8, max=4096, help="Pixels")] = 224,
    threads: Annotated[
        str | None, typer.Option(metavar="N,N", help="Default: 1, 2, 4, ... to all cores")
    ] = None,
    machine: Annotated[
        str | None, typer.Option(help="Only this one of EC2's: g5.xlarge, ...")
    ] = None,
    seconds: Annotated[
        float, typer.Option(min=0.1, help="How long each number of threads is measured")
    ] = 3.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON")] = False,
) -> None:
    """Measure images a second, alone on the machine, and compare with what GPUs want."""
    counts = _counts(threads)
    machines = _machines(machine)

    from pitstop.data.bench import bench as measure
    from pitstop.data.manifest import read_manifest
    from pitstop.data.open import open_dataset

    def say(line: str) -> None:
        typer.echo(line, err=True)

    with image_progress("packing") as progress:
        dataset = open_dataset(data, workers=cores(), progress=progress, say=say)
    measured = measure(
        dataset,
        resolution=resolution,
        threads=counts,
        seconds=seconds,
        say=lambda what: say(f"measuring: {what}"),
    )
    facts = _facts(dataset.path, measured, read_manifest(dataset.path)["made"], machines)
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
        return
    for line in _lines(facts):
        typer.echo(line)


def _counts(threads: str | None) -> list[int]:
    """Returns the numbers of threads, in ascending order."""
    if threads is None:
        doubled = [2**power for power in range(cores().bit_length())]
        return sorted({*doubled, cores()})
    stated = threads.split(",")
    if not all(part.strip().isdecimal() and int(part) > 0 for part in stated):
        raise InputError(f"--threads {threads}: write numbers of threads, such as 1,2,4")
    return sorted({int(part) for part in stated})


def _machines(name: str | None) -> "list[Machine]":
    from pitstop.core.strict import did_you_mean
    from pitstop.plan.feeding import SHOWN
    from pitstop.plan.machines import machines

    known = {machine.name: machine for machine in machines()}
    if name is None:
        return [known[shown] for shown in SHOWN]
    if name not in known:
        meant = did_you_mean(name, list(known)) or f": those known are {', '.join(known)}"
        raise InputError(f"--machine {name} is not known{meant}")
    return [known[name]]


def _facts(
    path: Path, measured: "Bench", made: dict[str, Any], machines: "list[Machine]"
) -> dict[str, Any]:
    from pitstop.data.bench import cheaper_packing
    from pitstop.plan.feeding import need

    parts = measured.microseconds
    total = sum(parts.values())
    most = max(measured.images_per_second)
    a_thread = measured.images_per_second[most] / most
    cheaper = cheaper_packing(measured.resolution, made)
    return {
        "path": str(path),
        "resolution": measured.resolution,
        "sample": measured.sample,
        "stored": list(measured.stored),
        "images_per_second": _rounded(measured.images_per_second),
        "cold_images_per_second": measured.cold_images_per_second,
        "microseconds": _rounded(parts),
        "share": {part: round(spent / total, 4) for part, spent in parts.items()},
        "machines": [
            asdict(one)
            | {
                "enough": one.enough,
                "workers": one.workers,
                "pack": [] if one.enough else cheaper,
            }
            for one in (need(machine, measured.resolution, a_thread) for machine in machines)
        ],
    }


def _rounded(values: dict[Any, float]) -> dict[Any, float]:
    return {key: round(value, 1) for key, value in values.items()}


def _lines(facts: dict[str, Any]) -> Iterator[str]:
    from pitstop.plan.estimate_view import Footnotes

    height, width = facts["stored"]
    yield (
        f"{facts['path']}: random crops of {height} x {width} pixels (median) "
        f"resized to {facts['resolution']}"
    )
    yield ""
    for count, rate in facts["images_per_second"].items():
        yield f"  {f'threads {count}':11} {rate:9,.0f} images/s, {rate / count:,.0f} each"
    cold = facts["cold_images_per_second"]
    if cold is not None:
        most = max(facts["images_per_second"])
        yield f"  {'first read':11} {cold:9,.0f} images/s, threads {most}"
    yield ""
    for part, spent in facts["microseconds"].items():
        yield f"  {part:11} {spent:9,.1f} us an image, {facts['share'][part]:.0%}"
    yield ""
    yield "GPUs that train ResNet-50, if threads there are as fast as here:"
    notes = Footnotes()
    for each in facts["machines"]:
        yield f"  {_verdict(each, notes.mark(each['source']))}"
    yield ""
    yield from notes.lines()


def _verdict(need: dict[str, Any], mark: str) -> str:
    wanted, expected = need["wanted_images_per_second"], need["expected_images_per_second"]
    wants = f"{need['gpus']} {need['gpu']} want {wanted:,.0f} images/s {mark}"
    gets = f"{need['vcpus']} threads give {expected:,.0f}"
    if need["enough"]:
        fix = f"enough: use --workers {need['workers']}"
    elif need["pack"]:
        fix = f"not enough: pack with {' or '.join(need['pack'])}"
    else:
        fix = "not enough: take a lower resolution, or a larger model"
    return f"{need['machine']:13} {wants}, {gets}: {fix}"
