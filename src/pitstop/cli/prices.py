"""`pitstop prices`: what machines cost, as far as it is known."""

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from pitstop.core.errors import InputError

if TYPE_CHECKING:  # they take their time
    from rich.table import Table

    from pitstop.plan.prices import Price


def prices(
    refresh: Annotated[
        bool, typer.Option("--refresh", help="Ask AWS first, and keep the answer as your own file")
    ] = False,
    region: Annotated[
        str | None, typer.Option(help="To ask AWS for (default: AWS_REGION, the profile's)")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON")] = False,
) -> None:
    """List the prices that plans are made with: dollars an hour, with their dates and sources."""
    from pitstop.plan.prices import known_prices, users_file

    if refresh:
        _refresh(region)
    elif region is not None:
        raise InputError("--region: is what --refresh asks AWS for: give that too")
    known = known_prices()
    if as_json:
        typer.echo(json.dumps({name: asdict(price) for name, price in known.items()}, indent=2))
        return
    from rich.console import Console

    Console().print(_table(known))
    typer.echo(f"your own prices come first: {users_file()}")


def _refresh(region: str | None) -> None:
    from pitstop.launch.aws import session
    from pitstop.plan.machines import SAGEMAKER, machines
    from pitstop.plan.prices import refresh, users_file

    names = [name for machine in machines() for name in (machine.name, SAGEMAKER + machine.name)]
    aws = session(region)
    told = refresh(names, aws.region_name, aws)
    typer.echo(f"{len(told)} prices of {aws.region_name} written into {users_file()}", err=True)


def _table(known: dict[str, "Price"]) -> "Table":
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in ("machine", "on demand", "spot", "date", "region", "source"):
        number = column in ("on demand", "spot")
        table.add_column(column, justify="right" if number else "left", no_wrap=column != "source")
    for name, price in known.items():
        dollars = ("?" if d is None else f"{d:,.3f}" for d in (price.on_demand, price.spot))
        cells = (name, *dollars, price.date, price.region, price.source)
        table.add_row(*map(Text, cells))
    return table
