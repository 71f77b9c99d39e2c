"""`pitstop launch sagemaker`."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from pitstop.cli.launch.common import (
    DryRun,
    LaunchData,
    Name,
    NodeCount,
    Region,
    Samples,
    Spot,
    Yes,
    make_request,
    needs_data,
    print_dry_run,
)
from pitstop.cli.options import RecipeName
from pitstop.core.errors import InputError


def sagemaker(
    context: typer.Context,
    recipe: RecipeName,
    machine: Annotated[str, typer.Option(help="The instance type: ml.p4d.24xlarge")],
    role: Annotated[
        str, typer.Option(metavar="ARN", help="The role that the job has", envvar="SAGEMAKER_ROLE")
    ],
    bucket: Annotated[str, typer.Option(help="For code, checkpoints and model; in the region")],
    data: LaunchData = None,
    name: Name = None,
    spot: Spot = False,
    nodes: NodeCount = 1,
    region: Region = None,
    prefix: Annotated[str, typer.Option(help="Folder of the bucket for all runs")] = "pitstop",
    checkpoints: Annotated[
        str | None,
        typer.Option(metavar="URL", help="Where checkpoints go (default: in the bucket)"),
    ] = None,
    channel: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=URL", help="Instead of --data: train=s3://..., val=s3://..."),
    ] = None,
    input_mode: Annotated[str, typer.Option(help="File, or FastFile: read from S3")] = "File",
    volume_gb: Annotated[int, typer.Option(min=1, help="Storage of each machine")] = 200,
    image: Annotated[
        str | None, typer.Option(help="Docker image (default: AWS's for PyTorch)")
    ] = None,
    max_run: Annotated[
        float | None, typer.Option(min=1, metavar="MINUTES", help="Default: from the plan")
    ] = None,
    max_wait: Annotated[
        float | None,
        typer.Option(min=1, metavar="MINUTES", help="With --spot: of training and waiting"),
    ] = None,
    resume: Annotated[
        str | None,
        typer.Option(metavar="URL|JOB", help="Begin from this run, under a name of its own"),
    ] = None,
    tag: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="On the job, besides its name")
    ] = None,
    samples: Samples = None,
    dry_run: DryRun = False,
    yes: Yes = False,
) -> None:
    """Train on SageMaker. Takes the options of `pitstop train` too."""
    if channel and data is not None:
        raise InputError("--data and --channel: give one of them")
    machine = f"ml.{machine.removeprefix('ml.')}"
    request = make_request(
        context,
        recipe,
        data=data,
        name=name,
        spot=spot,
        nodes=nodes,
        machine=machine,
        samples=samples,
    )
    from pitstop.launch import aws
    from pitstop.launch.request import ask, refuse_local_files
    from pitstop.launch.sagemaker import Target, compose, lines, next_steps, run_url, submit

    if channel:
        request = replace(request, data=None)
    else:
        needs_data(request)
    refuse_local_files(request)
    session = aws.session(region)
    previous = resume if resume is None or "://" in resume else run_url(resume, session)
    target = Target(
        region=session.region_name,
        role=role,
        bucket=bucket.removeprefix("s3://").strip("/"),
        machine=machine,
        prefix=prefix.strip("/"),
        volume_gb=volume_gb,
        image=image,
        checkpoints=checkpoints,
        channels=_pairs("--channel", channel),
        input_mode=input_mode,
        max_run_seconds=_seconds(max_run),
        max_wait_seconds=_seconds(max_wait),
        resume=previous,
        tags=_pairs("--tag", tag),
    )
    job = compose(request, target)
    shown = lines(request, target, job)
    if dry_run:
        import json

        return print_dry_run([*shown, json.dumps(job, indent=2)])
    ask(shown, yes=yes)
    import tempfile

    with tempfile.TemporaryDirectory(prefix="pitstop-") as scratch:
        arn = submit(session, request, target, job, Path(scratch))
    typer.echo("\n".join([f"submitted {arn}", *next_steps(request.name, target.region)]))
    return None


def _pairs(option: str, stated: list[str] | None) -> dict[str, str]:
    """Returns KEY=VALUE options as a mapping."""
    pairs: dict[str, str] = {}
    for text in stated or []:
        key, equals, value = text.partition("=")
        if not equals or not key or key in pairs:
            raise InputError(f"{option} {text}: write it as KEY=VALUE, each key once")
        pairs[key] = value
    return pairs


def _seconds(minutes: float | None) -> int | None:
    return None if minutes is None else round(60 * minutes)
