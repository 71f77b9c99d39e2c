"""`pitstop launch ec2`."""

import time
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pitstop.cli.launch.common import (
    DryRun,
    LaunchData,
    Name,
    NodeCount,
    Region,
    RemoteUrl,
    Samples,
    Spot,
    Yes,
    make_request,
    print_dry_run,
)
from pitstop.core.errors import InputError
from pitstop.core.exit_codes import FINISHED, INTERRUPTED

if TYPE_CHECKING:
    from pitstop.launch.ec2_plan import Settings
    from pitstop.launch.request import Request


def ec2(
    context: typer.Context,
    recipe: Annotated[
        str | None, typer.Argument(help="A recipe's name (see `pitstop recipes`) or a YAML file")
    ] = None,
    data: LaunchData = None,
    remote: RemoteUrl = None,
    machine: Annotated[str, typer.Option(help="The instance type")] = "g5.xlarge",
    instance_profile: Annotated[
        str | None, typer.Option(metavar="NAME|ARN", help="The rights of the machine")
    ] = None,
    name: Name = None,
    spot: Spot = False,
    nodes: NodeCount = 1,
    max_price: Annotated[
        float | None, typer.Option(min=0, help="Do not start above these dollars an hour")
    ] = None,
    max_run: Annotated[
        float | None,
        typer.Option(min=1, metavar="MINUTES", help="It ends itself then (default: from the plan)"),
    ] = None,
    restarts: Annotated[
        int, typer.Option(min=0, help="Stay, and start so many more when EC2 takes one away")
    ] = 0,
    region: Region = None,
    zone: Annotated[str | None, typer.Option(help="Availability zone (default: cheapest)")] = None,
    subnet: Annotated[str | None, typer.Option(metavar="ID")] = None,
    security_group: Annotated[list[str] | None, typer.Option(metavar="ID")] = None,
    key: Annotated[str | None, typer.Option(help="Name of the key pair for ssh")] = None,
    ami: Annotated[
        str | None, typer.Option(help="Image (default: the newest Deep Learning AMI)")
    ] = None,
    root_gb: Annotated[int | None, typer.Option(min=8, help="Root disk, gone with it")] = None,
    volume: Annotated[
        str | None, typer.Option(metavar="ID", help="An EBS volume of yours, mounted at /volume")
    ] = None,
    stage: Annotated[
        bool, typer.Option("--stage", help="Copy packed data from the volume to the own disk first")
    ] = False,
    prepare: Annotated[
        str | None, typer.Option(metavar="SRC", help="Pack it onto a new volume first")
    ] = None,
    volume_gb: Annotated[int | None, typer.Option(min=1, help="Of the new volume")] = None,
    prepare_machine: Annotated[
        str, typer.Option(help="The instance type that packs")
    ] = "c6i.4xlarge",
    files: Annotated[
        str | None,
        typer.Option(metavar="URL", help="Where it installs pitstop from (default: in --remote)"),
    ] = None,
    status: Annotated[
        bool, typer.Option("--status", help="List what was launched (with --name: by it)")
    ] = False,
    stop: Annotated[
        bool, typer.Option("--stop", help="End machines: they save first; --name for one launch")
    ] = False,
    cleanup: Annotated[
        bool, typer.Option("--cleanup", help="Stop, and delete all that was made but data")
    ] = False,
    samples: Samples = None,
    dry_run: DryRun = False,
    yes: Yes = False,
) -> int:
    """Train on a machine of EC2 that ends itself. Takes the options of `pitstop train` too."""
    from pitstop.launch import aws

    if status + stop + cleanup > 1:
        raise InputError("--status, --stop and --cleanup: give one of them")
    if status or stop or cleanup:
        if recipe is not None:
            raise InputError(f"{recipe}: --status, --stop and --cleanup take --name, no recipe")
        with aws.client(aws.session(region), "ec2") as client:
            if status:
                return _status(client, name)
            return _end(client, name, yes=yes, deletes=cleanup)
    if recipe is None:
        raise InputError("name a recipe (see `pitstop recipes`), or give --status")
    from pitstop.launch.ec2_plan import Settings

    settings = Settings(
        machine=machine,
        zone=zone,
        max_price=max_price,
        max_run=max_run,
        key=key,
        subnet=subnet,
        security_groups=tuple(security_group or ()),
        ami=ami,
        root_gb=root_gb,
        volume=volume,
        stage=stage,
        profile=instance_profile,
        files=files,
        prepare=prepare,
        volume_gb=volume_gb,
        prepare_machine=prepare_machine,
    )
    request = make_request(
        context,
        recipe,
        data=data,
        name=name,
        spot=spot,
        nodes=nodes,
        remote=remote,
        machine=machine,
        samples=samples,
    )
    with aws.client(aws.session(region), "ec2") as client:
        return _launch(client, request, settings, restarts, dry_run=dry_run, yes=yes)


def _launch(
    client: Any,
    request: "Request",
    settings: "Settings",
    restarts: int,
    *,
    dry_run: bool,
    yes: bool,
) -> int:
    from pitstop.launch.ec2 import exit_code, launch, restart, ssh_line
    from pitstop.launch.ec2_boot import compose
    from pitstop.launch.ec2_plan import plan
    from pitstop.launch.request import ask, shown

    planned = plan(client, request, settings)
    if dry_run:
        boot = compose(planned, wheel="pitstop.whl", offer=planned.offers[0])
        print_dry_run([*planned.lines, *(f"  {shown(step)}" for step in boot.steps)])
        return FINISHED
    ask(planned.lines, yes=yes)
    machine = launch(client, planned, say=_say, pause=time.sleep)
    typer.echo(machine.line)
    typer.echo(ssh_line(machine, planned.image.user))
    typer.echo(f"how it is: pitstop launch ec2 --status --name {request.name}")
    same_machine = f"--name {request.name} --ami {planned.image.id}"
    typer.echo(f"after an interruption: the same command with {same_machine}")
    if restarts == 0:
        return FINISHED
    same = replace(settings, ami=planned.image.id)
    ended = restart(
        client,
        machine,
        lambda: plan(client, request, same),
        restarts,
        say=_say,
        pause=time.sleep,
    )
    typer.echo(ended.line)
    code = exit_code(client, ended.id)
    return INTERRUPTED if code is None else code


def _status(client: Any, name: str | None) -> int:
    from pitstop.launch.ec2 import exit_code, find
    from pitstop.launch.ec2_volume import data_volumes

    machines, volumes = find(client, name), data_volumes(client, name)
    for machine in machines:
        code = exit_code(client, machine.id)
        typer.echo(machine.line if code is None else f"{machine.line}; exit code {code}")
    for volume in volumes:
        typer.echo(f"{volume.launch}: {volume.line}: {volume.state}")
    if not machines and not volumes:
        typer.echo(f"nothing of {name or 'pitstop'} in {client.meta.region_name}")
    return FINISHED


def _end(client: Any, name: str | None, *, yes: bool, deletes: bool) -> int:
    from pitstop.launch.ec2 import ALIVE, cleanup, find, stop
    from pitstop.launch.request import ask

    alive = [machine.line for machine in find(client, name) if machine.state in ALIVE]
    lines = [*(f"end {line}" for line in alive)]
    if deletes:
        lines.append(
            "delete their root disks and files; runs in buckets and volumes with data stay"
        )
    if not lines:
        typer.echo(f"no machine of {name or 'pitstop'} runs in {client.meta.region_name}")
        return FINISHED
    ask(lines, yes=yes)
    if deletes:
        done = cleanup(client, name, pause=time.sleep)
    else:
        ended = stop(client, name)
        done = [f"{one.id} ends; the same launch of {one.launch} goes on" for one in ended]
    for line in done:
        typer.echo(line)
    return FINISHED


def _say(line: str) -> None:
    typer.echo(line)
