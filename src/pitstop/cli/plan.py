"""`pitstop plan`: what a run will do and what it will cost where, before it does it."""

import functools
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pitstop.cli.options import Set, parse_sets
from pitstop.core.errors import InputError

if TYPE_CHECKING:  # they take their time
    from pitstop.core.timeline import Timeline
    from pitstop.plan.budget import Unit
    from pitstop.plan.cost import Estimate
    from pitstop.plan.estimate_view import StepMemory, Told
    from pitstop.plan.machines import Machine

IMAGENET = 1_281_167
"""Training images of ImageNet-1k, which a recipe that names no data is planned for."""

MOST_INTERRUPTIONS = 60
"""An hour: a machine that is gone within a minute trains nothing."""

Samples = Annotated[
    int | None, typer.Option(min=1, help="Training images (default: the recipe's data)")
]
CountedData = Annotated[
    str | None, typer.Option("--data", help="Count the training images of this")
]
Epochs = Annotated[float | None, typer.Option(help="Epochs of the whole run")]
MachineName = Annotated[
    str | None,
    typer.Option("--machine", help="Tell time and cost on it: p4d.24xlarge, ml.g5.xlarge, local"),
]
Spot = Annotated[bool, typer.Option("--spot", help="At the spot price, with interruptions")]
NodeCount = Annotated[int, typer.Option("--nodes", min=1, help="Machines that train together")]
Interruptions = Annotated[
    str | None, typer.Option(metavar="N/h", help="How often the machine is taken away: 0.05/h")
]


def plan(
    recipe: Annotated[str, typer.Argument(help="A recipe's name or a YAML file")] = "demo",
    other: Annotated[str | None, typer.Argument(help="Another, to compare it with")] = None,
    samples: Samples = None,
    data: CountedData = None,
    set_: Set = None,
    epochs: Epochs = None,
    machine: MachineName = None,
    machines: Annotated[
        str | None, typer.Option(metavar="all|M,M", help="Rank these by time and cost")
    ] = None,
    spot: Spot = False,
    nodes: NodeCount = 1,
    interruptions: Interruptions = None,
    minutes: Annotated[
        float | None, typer.Option(help="Plan as many epochs as fit into this on the machine")
    ] = None,
    dollars: Annotated[
        float | None, typer.Option(help="Plan as many epochs as this pays for on the machine")
    ] = None,
    memory: Annotated[
        bool, typer.Option("--memory", help="Count the memory and FLOPs of a step, in seconds")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON")] = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print CSV, a row an epoch")] = False,
    plot: Annotated[Path | None, typer.Option(help="Draw the plan into this PNG")] = None,
) -> None:
    """Show what a recipe will do: phases, steps, shapes, learning rate. Or how two differ.

    With --machine also what it takes and costs there.
    """
    if as_json and as_csv:
        raise InputError("--json and --csv exclude each other")
    if as_csv and other is not None:
        raise InputError("--csv: is for one recipe; --json has both")
    terms = Terms.of(machine, machines, spot, nodes, interruptions)
    overrides = ({"epochs": epochs} if epochs is not None else {}) | parse_sets(set_)
    budget = Budget.of(minutes, dollars, machine, overrides)
    planner = Planner(overrides, samples, data)
    names = [recipe] if other is None else [recipe, other]
    if machines is not None:
        if other or machine or memory or as_csv:
            raise InputError("--machines: ranks them for one recipe: give --machine for the rest")
        plans = [planner(recipe)]
        _print_ranking(
            [terms.estimate(plans[0], each) for each in _listed(machines)], as_json=as_json
        )
    else:
        told = [_tell(name, planner, terms, budget, memory=memory) for name in names]
        plans = [each.timeline for each in told]
        _print(told, terms, as_json=as_json, as_csv=as_csv)
    if plot is not None:
        from pitstop.plan.picture import draw

        draw_into(plot, lambda path: draw(plans, path))


# What the options mean; `pitstop simulate` has them too


@dataclass(frozen=True)
class Terms:
    """What is rented, and how."""

    machine: "Machine | None"
    spot: bool
    nodes: int
    interruptions: float | None

    @classmethod
    def of(
        cls,
        machine: str | None,
        machines: str | None,
        spot: bool,
        nodes: int,
        interruptions: str | None,
    ) -> "Terms":
        """Returns those of the options.

        Raises:
            InputError: there is no such machine, or none is named and how it is rented is.
        """
        often = parse_interruptions(interruptions)
        if machine is None and machines is None:
            stated = {"--spot": spot, "--nodes": nodes > 1, "--interruptions": often is not None}
            for option, given in stated.items():
                if given:
                    raise InputError(f"{option}: of which machine? give --machine")
        return cls(_find_machine(machine), spot, nodes, often)

    def estimate(self, timeline: "Timeline", on: "Machine | None" = None) -> "Estimate":
        """Returns what a plan takes and costs on the machine, or on another."""
        from pitstop.plan.cost import estimate

        machine = on or self.machine
        assert machine is not None
        return estimate(
            timeline,
            machine,
            nodes=self.nodes,
            spot=self.spot,
            interruptions_per_hour=self.interruptions,
        )


def _find_machine(name: str | None) -> "Machine | None":
    if name is None:
        return None
    from pitstop.plan.machines import find_machine

    return find_machine(name)


@dataclass(frozen=True)
class Planner:
    """What recipes are planned with. The images of a dataset are counted once."""

    overrides: dict[str, Any]
    samples: int | None
    data: str | None
    counts: dict[str, int] = field(default_factory=dict[str, int])

    def __call__(self, name: str, epochs: float | None = None) -> "Timeline":
        """Returns the plan of a recipe, of so many epochs or of its own."""
        from pitstop.core.recipe import load_recipe
        from pitstop.core.timeline import Timeline

        stated = {} if epochs is None else {"epochs": epochs}
        recipe = load_recipe(name, self.overrides | stated)
        data = self.data or recipe.data
        counted = IMAGENET if data is None else self._count(data)
        return Timeline.planned(recipe, self.samples or counted)

    def _count(self, data: str) -> int:
        from pitstop.data.resolve import count_training_images

        if data not in self.counts:
            note = functools.partial(typer.echo, err=True)
            self.counts[data] = count_training_images(data, say=note)
        return self.counts[data]


@dataclass(frozen=True)
class Budget:
    """What a run may take or cost."""

    limit: float
    unit: "Unit"

    @classmethod
    def of(
        cls,
        minutes: float | None,
        dollars: float | None,
        machine: str | None,
        overrides: dict[str, Any],
    ) -> "Budget | None":
        """Returns that of the options, None without one.

        Raises:
            InputError: both are given, or no machine, or the epochs are.
        """
        if minutes is not None and dollars is not None:
            raise InputError("--minutes and --dollars exclude each other")
        budget = cls(minutes, "minutes") if minutes is not None else None
        budget = cls(dollars, "dollars") if dollars is not None else budget
        if budget is not None and machine is None:
            raise InputError(f"--{budget.unit}: on which machine? give --machine")
        if budget is not None and "epochs" in overrides:
            raise InputError(f"--{budget.unit}: solves for the epochs: leave them out")
        return budget


def parse_interruptions(text: str | None) -> float | None:
    """Returns how often an hour: of `0.05/h`, or `0.05`.

    Raises:
        InputError: it is neither, or not from 0 to `MOST_INTERRUPTIONS`.
    """
    if text is None:
        return None
    try:
        often = float(text.removesuffix("/h"))
    except ValueError:
        raise InputError(
            f"--interruptions {text}: write how often in an hour, such as 0.05/h"
        ) from None
    if not 0 <= often <= MOST_INTERRUPTIONS:
        raise InputError(f"--interruptions {text}: give from 0 to {MOST_INTERRUPTIONS} an hour")
    return often


def _listed(machines: str) -> "list[Machine]":
    """Returns the machines of `--machines`; all are those whose price is known."""
    from pitstop.plan.machines import SAGEMAKER, find_machine
    from pitstop.plan.machines import machines as known
    from pitstop.plan.prices import find_price

    if machines != "all":
        return [find_machine(name.strip()) for name in machines.split(",")]
    names = [name for machine in known() for name in (machine.name, SAGEMAKER + machine.name)]
    return [find_machine(name) for name in names if find_price(name) is not None]


# What is printed


def _tell(
    name: str, planner: Planner, terms: Terms, budget: Budget | None, *, memory: bool
) -> "Told":
    """Plans a recipe, and finds out what is asked of it."""
    from pitstop.plan.budget import estimate_within
    from pitstop.plan.estimate_view import Told

    if budget is None:
        timeline = planner(name)
    else:
        timeline = estimate_within(
            budget.limit, lambda epochs: terms.estimate(planner(name, epochs)), unit=budget.unit
        ).timeline
    # Counted first: an estimate of a model that is in no table takes its FLOPs from there.
    counted = _count_memory(timeline, terms) if memory else ()
    return Told(timeline, terms.estimate(timeline) if terms.machine else None, counted)


def _count_memory(timeline: "Timeline", terms: Terms) -> "tuple[StepMemory, ...]":
    """Returns what a step of each segment takes of each GPU; without a machine, of a single one."""
    from pitstop.engine.footprint import footprint, largest_micro_batch
    from pitstop.plan.estimate_view import StepMemory

    machine = terms.machine
    ranks = max(1, machine.gpus) * terms.nodes if machine else 1
    card = machine.gpu_memory_gib if machine else None
    steps: list[StepMemory] = []
    for segment in timeline.segments:
        taken = footprint(timeline.recipe, segment, ranks=ranks)
        fits = None
        if card is not None:
            fits = largest_micro_batch(timeline.recipe, segment, card, ranks=ranks)
        steps.append(StepMemory(segment, ranks, card, taken.bytes, taken.flops_per_image, fits))
    return tuple(steps)


def _print(told: list["Told"], terms: Terms, *, as_json: bool, as_csv: bool) -> None:
    from pitstop.plan import explain
    from pitstop.plan.budget import fast_for_as_much
    from pitstop.plan.estimate_view import told_json, told_table

    if as_json:
        typer.echo(json.dumps(told_json(told), indent=2))
    elif as_csv:
        typer.echo(explain.as_csv(told[0].timeline), nl=False)
    else:
        from rich.console import Console

        alone = told[0].estimate if len(told) == 1 else None
        fast = fast_for_as_much(alone, terms.estimate) if alone else None
        Console().print(told_table(told, fast))


def _print_ranking(estimates: list["Estimate"], *, as_json: bool) -> None:
    from pitstop.plan.estimate_view import ranking, ranking_json

    if as_json:
        typer.echo(json.dumps(ranking_json(estimates), indent=2))
    else:
        from rich.console import Console

        Console().print(ranking(estimates))


def draw_into(plot: Path, draw: Callable[[Path], None]) -> None:
    """Draws the picture of `--plot` into a PNG.

    Raises:
        InputError: it cannot be written.
    """
    if plot.is_dir():
        raise InputError(f"--plot {plot}: is a directory: name a file")
    try:
        draw(plot)
    except OSError as error:
        raise InputError(f"--plot {plot}: cannot be written: {error.strerror}") from None
    typer.echo(f"drawn into {plot}", err=True)
