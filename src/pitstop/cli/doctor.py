"""`pitstop doctor`: is this machine fit for a recipe and its data?"""

import json
from pathlib import Path
from typing import Annotated

import typer

from pitstop.cli.options import Data
from pitstop.core.errors import InputError
from pitstop.core.exit_codes import BAD_INPUT


def doctor(
    data: Data = None,
    recipe: Annotated[
        str, typer.Option(help="A recipe's name (see `pitstop recipes`) or a YAML file")
    ] = "demo",
    quick: Annotated[
        bool, typer.Option("--quick", help="Leave out what takes minutes: training, above all")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON")] = False,
    markdown: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the findings into this file too")
    ] = None,
) -> None:
    """Measure whether this machine is fit for a recipe and its data; nothing else should run.

    Exit code 0 only when no check has failed, 2 when one has.
    """
    from rich.console import Console

    from pitstop.core.recipe import load_recipe

    if markdown is not None and not markdown.parent.is_dir():
        raise InputError(f"--markdown {markdown}: there is no directory {markdown.parent}: make it")
    if markdown is not None and markdown.is_dir():
        raise InputError(f"--markdown {markdown}: is a directory: name a file")
    loaded = load_recipe(recipe, {} if data is None else {"data": data})

    from pitstop.engine.doctor import examine
    from pitstop.io.storage import write_text
    from pitstop.report import diagnosis

    findings = examine(loaded, thorough=not quick, say=lambda line: typer.echo(line, err=True))
    if as_json:
        typer.echo(json.dumps(diagnosis.as_json(findings), indent=2))
    else:
        diagnosis.show(findings, Console(highlight=False))
    if markdown is not None:
        write_text(markdown, diagnosis.markdown(findings))
    if not diagnosis.is_fit(findings):
        raise typer.Exit(BAD_INPUT)
