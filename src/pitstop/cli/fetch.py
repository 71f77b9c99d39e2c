"""`pitstop fetch`."""

from pathlib import Path
from typing import Annotated

import typer

from pitstop.core.errors import InputError


def fetch(
    source: Annotated[
        str,
        typer.Argument(
            metavar="URL|JOB",
            help="A run's --remote, a folder or .tar.gz of a run; or the name of a launched one",
        ),
    ],
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Becomes the run directory")],
    region: Annotated[str | None, typer.Option(help="AWS region, for a name")] = None,
) -> None:
    """Bring a run home: records, checkpoints and weights."""
    from pitstop.io.fetch import fetch

    is_place = "://" in source or Path(source).expanduser().exists()
    url = source if is_place else _launched(source, region)
    run = fetch(url, directory, say=lambda line: typer.echo(line, err=True))
    state = run.read() or {}
    status, step = state.get("status", "a run"), state.get("step", "?")
    typer.echo(f"{directory}: {status}, step {step} of {state.get('steps', '?')}, from {url}")


def _launched(name: str, region: str | None) -> str:
    """Returns where the run of a job of SageMaker, or of a launch on EC2, is kept."""
    from pitstop.launch import aws, ec2, sagemaker

    session = aws.session(region)
    problems: list[str] = []
    for launcher in (sagemaker, ec2):
        try:
            return launcher.run_url(name, session)
        except InputError as error:
            problems.append(str(error))
    raise InputError(f"{name}: no URL, and no launch either: {'; '.join(problems)}")
