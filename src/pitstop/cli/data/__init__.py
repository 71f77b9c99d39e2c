"""`pitstop data`: pack, look at, and move datasets; one module a verb."""

import typer

app = typer.Typer(help="Pack, look at, and move datasets.", no_args_is_help=True)
