"""`pitstop simulate`: how long a run takes and what it costs when machines are taken away."""

import json
from pathlib import Path
from typing import Annotated

import typer

from pitstop.cli.options import RecipeName, Set, parse_sets
from pitstop.cli.plan import (
    CountedData,
    Epochs,
    Interruptions,
    NodeCount,
    Planner,
    Samples,
    Spot,
    Terms,
    draw_into,
)


def simulate(
    recipe: RecipeName,
    machine: Annotated[str, typer.Option(help="On this: p4d.24xlarge, ml.g5.xlarge, local")],
    spot: Spot = False,
    nodes: NodeCount = 1,
    interruptions: Interruptions = None,
    runs: Annotated[int, typer.Option(min=1, max=1_000_000, help="How often")] = 1000,
    seed: Annotated[int, typer.Option(min=0, help="Of the random numbers")] = 0,
    samples: Samples = None,
    data: CountedData = None,
    set_: Set = None,
    epochs: Epochs = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON")] = False,
    plot: Annotated[Path | None, typer.Option(help="Draw the runs into this PNG")] = None,
) -> None:
    """Play a run through many times, on machines that are taken away at random moments.

    Interruptions come without a notice. Another machine is there when the plan assumes it.
    """
    from pitstop.plan import simulate as play
    from pitstop.plan.estimate_view import simulated_table

    terms = Terms.of(machine, None, spot, nodes, interruptions)
    overrides = ({"epochs": epochs} if epochs is not None else {}) | parse_sets(set_)
    timeline = Planner(overrides, samples, data)(recipe)
    estimate = terms.estimate(timeline)
    simulation = play.simulate(
        play.Course.of(estimate), estimate.interruptions_per_hour.value, runs=runs, seed=seed
    )
    if as_json:
        named = {"recipe": timeline.recipe.name, "machine": machine, "nodes": nodes, "spot": spot}
        expected = {"expected_minutes": estimate.minutes, "sources": estimate.sources}
        typer.echo(json.dumps({**named, **simulation.as_json(), **expected}, indent=2))
    else:
        from rich.console import Console

        Console().print(simulated_table(estimate, simulation))
    if plot is not None:
        from pitstop.plan.simulation_picture import draw

        title = f"{timeline.recipe.name} on {machine}"
        draw_into(plot, lambda path: draw(simulation, title, path))
