"""Options that several verbs share."""

from typing import Annotated, Any

import typer

from pitstop.core.errors import InputError

RecipeName = Annotated[
    str, typer.Argument(help="A recipe's name (see `pitstop recipes`) or a YAML file")
]
Data = Annotated[str | None, typer.Option(help="A packed dataset, a class folder, or `digits`")]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override any key: phases.1.resolution=192"),
]
Workers = Annotated[
    int | None, typer.Option(min=1, help="Threads that decode images (default: all cores)")
]


def parse_sets(sets: list[str] | None) -> dict[str, Any]:
    """Returns `--set key=value` options as a mapping; values are YAML.

    Raises:
        InputError: one has no `=`, or a value that is not YAML.
    """
    import yaml

    overrides: dict[str, Any] = {}
    for item in sets or []:
        key, equals, value = item.partition("=")
        if not equals or not key:
            raise InputError(f"--set {item}: write it as KEY=VALUE")
        try:
            overrides[key.strip()] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise InputError(f"--set {item}: the value is not YAML") from None
    return overrides


def note(line: str) -> None:
    """Prints a line for the user, apart from what the verb answers."""
    typer.echo(line, err=True)
