"""`pitstop recipes`: what there is to train."""

from typing import Annotated

import typer

app = typer.Typer(help="List the recipes, or show one.", invoke_without_command=True)


@app.callback()
def list_recipes(context: typer.Context) -> None:
    """List the recipes, each with the first line of its header."""
    if context.invoked_subcommand is not None:
        return
    from pitstop.core.recipe import bundled_recipes

    for name, path in bundled_recipes().items():
        headline = path.read_text().partition("\n")[0].removeprefix("#").strip()
        typer.echo(f"{name:14} {headline}")


@app.command("show")
def show(name: Annotated[str, typer.Argument(help="A recipe's name or a YAML file")]) -> None:
    """Print a recipe's file: its header and what it sets."""
    from pitstop.core.recipe import find_recipe

    typer.echo(find_recipe(name).read_text(), nl=False)
