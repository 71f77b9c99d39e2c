"""`pitstop launch sky`."""

from pathlib import Path
from typing import Annotated

import typer

from pitstop.cli.launch.common import (
    DryRun,
    LaunchData,
    Name,
    NodeCount,
    RemoteUrl,
    Samples,
    Spot,
    Yes,
    make_request,
    print_dry_run,
)
from pitstop.cli.options import RecipeName


def sky(
    context: typer.Context,
    recipe: RecipeName,
    data: LaunchData = None,
    name: Name = None,
    remote: RemoteUrl = None,
    spot: Spot = False,
    nodes: NodeCount = 1,
    gpus: Annotated[
        str | None, typer.Option(metavar="KIND:N", help="Of each node: A100:8, L4:1, ...")
    ] = None,
    infra: Annotated[
        str | None, typer.Option(help="aws, gcp/us-central1, k8s, ... (default: the cheapest)")
    ] = None,
    instance_type: Annotated[
        str | None, typer.Option(help="A machine of the cloud, instead of --gpus")
    ] = None,
    disk_gb: Annotated[int | None, typer.Option(min=1, help="Disk of each node")] = None,
    task: Annotated[
        Path | None, typer.Option(help="A YAML file with more keys of a SkyPilot task")
    ] = None,
    to: Annotated[
        Path | None, typer.Option(help="Write the task into this folder (default: launched/NAME)")
    ] = None,
    samples: Samples = None,
    dry_run: DryRun = False,
    yes: Yes = False,
) -> None:
    """Train as a managed job of SkyPilot: on any cloud, on several nodes, on spot machines.

    Takes the options of `train` too.
    """
    from pitstop.launch import sky as launcher
    from pitstop.launch.request import ask, cost_lines, refuse_local_files, shown

    request = make_request(
        context,
        recipe,
        data=data,
        name=name,
        spot=spot,
        nodes=nodes,
        remote=remote,
        machine=instance_type or _machine(gpus),
        samples=samples,
    )
    refuse_local_files(request)
    folder = to or Path("launched") / request.name
    composed = launcher.compose(
        request,
        folder,
        gpus=gpus,
        infra=infra,
        instance_type=instance_type,
        disk_gb=disk_gb,
        additions=None if task is None else launcher.read_additions(task),
    )
    command = launcher.submission(request, folder / launcher.TASK)
    lines = [
        f"{folder}: the task, the recipe and pitstop's wheel",
        f"a managed job {request.name} on {nodes} {'spot ' if spot else ''}node(s) of "
        f"{instance_type or gpus or 'one CPU machine'}, and SkyPilot's controller if there is none",
        f"{request.remote}: the run is kept here",
        *cost_lines(request.estimate),
    ]
    if dry_run:
        print_dry_run([*lines, "", composed.to_yaml(), shown(command)])
        return
    ask(lines, yes=yes)
    launcher.write(request, composed, folder)
    if not launcher.submit(command):
        typer.echo(f"sky is not installed here; where it is: {shown(command)}")
    typer.echo(f"to bring it home: {shown(['pitstop', 'fetch', request.remote or '', 'DIR'])}")


def _machine(gpus: str | None) -> str | None:
    """Returns the machine of AWS that has such GPUs, by which the price is told."""
    from pitstop.plan.machines import machines

    kind, _, count = (gpus or "").partition(":")
    known = (m.name for m in machines() if (m.gpu, str(m.gpus)) == (kind, count or "1"))
    return next(known, None)
