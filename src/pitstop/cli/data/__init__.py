"""`pitstop data`: pack, look at, and move datasets; one module a verb."""

import typer

from pitstop.cli.data import bench, check, get, info, pack, split, stage, subset

app = typer.Typer(help="Pack, look at, and move datasets.", no_args_is_help=True)
app.command("pack")(pack.pack)
app.command("stage")(stage.stage)
app.command("info")(info.info)
app.command("check")(check.check)
app.command("split")(split.split)
app.command("subset")(subset.subset)
app.command("get")(get.get)
app.command("bench")(bench.bench)
