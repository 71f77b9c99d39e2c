"""Shows what a run will cost: on one machine, beside another recipe, on all machines.

Every number has its source as a footnote.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

from pitstop.core.timeline import Segment, Timeline
from pitstop.plan import compare, explain
from pitstop.plan.budget import in_words
from pitstop.plan.cost import Estimate, SegmentEstimate, as_json
from pitstop.plan.machines import LOCAL, Claim
from pitstop.plan.notes import by_phase
from pitstop.plan.rates import Figure

if TYPE_CHECKING:  # rich is imported by who prints
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    from pitstop.plan.simulate import Simulation

UNKNOWN = "?"


@dataclass(frozen=True)
class StepMemory:
    """What a step takes of each of so many GPUs."""

    segment: Segment
    ranks: int
    card_gib: float | None
    """The memory of a GPU; None where no GPU is asked about."""
    bytes: int
    flops_per_image: float
    largest_micro_batch: int | None
    """That fits; None where not even one image does, or no GPU is asked about."""

    @property
    def share(self) -> int:
        """Images of a batch on one GPU."""
        return -(-self.segment.batch_size // self.ranks)

    @property
    def micro_batch(self) -> int:
        return -(-self.share // self.segment.phase.grad_accum_steps)

    @property
    def overflows(self) -> bool:
        return self.card_gib is not None and (self.largest_micro_batch or 0) < self.micro_batch

    def as_json(self) -> dict[str, Any]:
        fits = {"largest_micro_batch": self.largest_micro_batch} if self.card_gib else {}
        return {
            "micro_batch": self.micro_batch,
            "memory_gib": round(self.bytes / 2**30, 3),
            "gflops_per_image": round(self.flops_per_image / 1e9, 3),
            **fits,
        }


@dataclass(frozen=True)
class Told:
    """A plan, and what was found out about it."""

    timeline: Timeline
    estimate: Estimate | None = None
    memory: tuple[StepMemory, ...] = ()


def told_json(told: Sequence[Told]) -> dict[str, Any]:
    """Returns one plan, or two and how they differ, as plain data; costs are merged into them."""
    plans = [_plan_json(each) for each in told]
    if len(plans) == 1:
        return plans[0]
    differing = compare.differences([each.timeline for each in told])
    return {"plans": plans, "differences": differing}


def _plan_json(told: Told) -> dict[str, Any]:
    plan = explain.as_json(told.timeline)
    cost = as_json(told.estimate) if told.estimate else {}
    parts = [plan["segments"], cost.get("segments", []), [m.as_json() for m in told.memory]]
    segments = [
        {key: value for part in parts_of_one for key, value in part.items()}
        for parts_of_one in zip_longest(*parts, fillvalue=dict[str, Any]())
    ]
    return {**plan, **cost, "segments": segments}


def told_table(told: Sequence[Told], fast: Estimate | None = None) -> "Group":
    """Returns what rich prints.

    Args:
        told: one plan, or two that are compared.
        fast: what `fast` is at the same cost, to be shown beside the one plan.
    """
    from rich.console import Group

    first = told[0]
    assert fast is None or len(told) == 1
    estimates = [each.estimate for each in told if each.estimate]
    if len(told) > 1:
        parts: list[Any] = [compare.compared_table([each.timeline for each in told])]
        parts += [beside(estimates), *_sources(estimates)] if estimates else []
    else:
        parts = [explain.table(first.timeline)]
        parts += ["", table(first.estimate, fast)] if first.estimate else []
    parts += [memory_table(each.memory) for each in told if each.memory]
    return Group(*parts)


@dataclass
class Footnotes:
    """Numbers the sources in the order in which they are asked for."""

    sources: list[str] = field(default_factory=list[str])

    def mark(self, source: str) -> str:
        """Returns `[3]` for a source."""
        if source not in self.sources:
            self.sources.append(source)
        return f"[{self.sources.index(source) + 1}]"

    def lines(self) -> list[str]:
        return [f"[{number}] {source}" for number, source in enumerate(self.sources, 1)]


# A recipe on a machine


def table(estimate: Estimate, fast: Estimate | None = None) -> "Group":
    """Returns what rich prints: the segments as a table, what comes on top of them, the sources.

    Args:
        fast: what `fast` is at the same cost.
    """
    from rich.console import Group
    from rich.text import Text

    notes = Footnotes()
    segments = _segments(estimate, notes)
    below = list(_below(estimate, notes))
    rival = [beside([estimate, fast]), _fast_line(estimate, fast)] if fast else []
    return Group(
        Text(_headline(estimate), style="bold"),
        segments,
        *(Text(f"- {line}") for line in below),
        *rival,
        *_footnotes(estimate, notes),
    )


def _footnotes(estimate: Estimate, notes: Footnotes) -> "list[Text]":
    """Returns the sources that were marked, and then the others, under a title."""
    from rich.text import Text

    for source in estimate.sources:
        notes.mark(source)
    return [Text("\nsources", style="bold"), *map(Text, notes.lines())]


def _headline(estimate: Estimate) -> str:
    return (
        f"{estimate.timeline.recipe.name} on {_machine(estimate)}: "
        f"{in_words(estimate.minutes, 'minutes')}, {_dollars(estimate.dollars)}, "
        f"{estimate.images_per_second:,.0f} images/s, bottleneck: {estimate.bottleneck}"
    )


def _machine(estimate: Estimate) -> str:
    machine = estimate.machine
    times = f"{estimate.nodes} x " if estimate.nodes > 1 else ""
    kind = f"{machine.gpus} x {machine.gpu}, " if machine.gpu else ""
    market = ", spot" if estimate.spot else ""
    return f"{times}{machine.name} ({kind}{machine.vcpus} vCPUs{market})"


def _segments(estimate: Estimate, notes: Footnotes) -> "Table":
    from rich import box
    from rich.table import Table
    from rich.text import Text

    rows = [_cells(part, estimate, notes) for part in estimate.segments]
    segments = Table(box=box.SIMPLE_HEAD)
    for key in rows[0]:
        words = key in ("phase", "bottleneck")
        segments.add_column(key, justify="left" if words else "right", no_wrap=key != "phase")
    for row in rows:
        segments.add_row(*map(Text, row.values()))
    return segments


def _cells(part: SegmentEstimate, estimate: Estimate, notes: Footnotes) -> dict[str, str]:
    slowest = part.rates[part.bottleneck]
    dollars = estimate.dollars_of(part.seconds + part.compile_seconds)
    return {
        "phase": part.segment.phase.name,
        "px": str(part.segment.resolution),
        "batch": f"{part.segment.batch_size:,}",
        "images/s": f"{part.images_per_second:,.0f}",
        "min": _short(part.seconds / 60),
        "compiling": _time(part.compile_seconds),
        "$": _dollars(dollars).removeprefix("$"),
        "bottleneck": f"{part.bottleneck} {notes.mark(slowest.source)}",
    }


def _below(estimate: Estimate, notes: Footnotes) -> Iterator[str]:
    yield from _could_do(estimate, notes)
    yield from _around(estimate, notes)
    yield from _interruptions(estimate, notes)
    yield _price(estimate, notes)
    if estimate.machine.name != LOCAL:
        wait = f", max-wait {estimate.max_wait_seconds:,} s" if estimate.spot else ""
        yield f"for SageMaker: max-run {estimate.max_run_seconds:,} s{wait}"
    yield from (f"claimed: {_claim(claim)} ({claim.source})" for claim in _claims(estimate))


def _could_do(estimate: Estimate, notes: Footnotes) -> Iterator[str]:
    """What each part of the machine could do: what is next when the bottleneck is gone."""
    facts: list[tuple[str, str]] = []
    for part in estimate.segments:
        rates = sorted(part.rates.items(), key=lambda rate: rate[1].value)
        figures = (f"{name} {_figure(figure, notes)}" for name, figure in rates)
        facts.append(
            (f"{part.segment.resolution} px", f"images/s of each part: {', '.join(figures)}")
        )
    yield from by_phase(facts)


def _around(estimate: Estimate, notes: Footnotes) -> Iterator[str]:
    start = [("staging the data", estimate.preparation), ("start-up", estimate.startup)]
    taken = (f"{name} {_lasting(figure, notes)}" for name, figure in start if figure.value)
    yield f"before the first step: {', '.join(taken) or 'nothing'}"
    if estimate.finder_seconds:
        yield f"the search for the lr: {_time(estimate.finder_seconds)}"
    evaluation = estimate.evaluation
    yield (
        f"{len(estimate.timeline.evaluations)} evaluations: {_time(estimate.evaluation_seconds)}, "
        f"at {_figure(evaluation, notes)} images/s"
    )
    yield (
        f"checkpoints every {_time(estimate.interval_seconds)}: "
        f"{_time(estimate.checkpoint_seconds)}, each {_lasting(estimate.save, notes)}"
    )


def _interruptions(estimate: Estimate, notes: Footnotes) -> Iterator[str]:
    rate, restart = estimate.interruptions_per_hour, estimate.restart
    if rate.value:
        yield (
            f"{rate.value:g} interruptions an hour {notes.mark(rate.source)}: "
            f"{estimate.interruptions:.2g} expected, {_time(estimate.interruption_seconds)}; "
            f"each restart takes {_lasting(restart, notes)}"
        )


def _price(estimate: Estimate, notes: Footnotes) -> str:
    hourly, price = estimate.dollars_per_hour, estimate.price
    if hourly is None or price is None:
        return f"the price of {estimate.machine.name} is not known (see `pitstop prices`)"
    machines = f" for {estimate.nodes} machines" if estimate.nodes > 1 else ""
    market = "spot" if estimate.spot else "on demand"
    return f"${hourly:,.2f} an hour{machines}, {market} {notes.mark(price.stated)}"


# Several recipes


def beside(estimates: Sequence[Estimate]) -> "Table":
    """Returns what rich prints: what recipes will cost, a column each."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table("", box=box.SIMPLE_HEAD)
    for estimate in estimates:
        table.add_column(Text(estimate.timeline.recipe.name), justify="right")
    rows = {
        "epochs": [f"{estimate.timeline.epochs:.4g}" for estimate in estimates],
        "time": [in_words(estimate.minutes, "minutes") for estimate in estimates],
        "cost": [_dollars(estimate.dollars) for estimate in estimates],
        "images/s": [f"{estimate.images_per_second:,.0f}" for estimate in estimates],
        "bottleneck": [estimate.bottleneck for estimate in estimates],
    }
    for name, cells in rows.items():
        table.add_row(name, *map(Text, cells))
    return table


FAST = {16: 73.76, 24: 75.56, 32: 76.59, 40: 77.24, 56: 78.02, 88: 78.43}
"""Top-1 of `fast` by its epochs, published in FFCV's logs of ResNet-50, 256 px."""


def _fast_line(other: Estimate, fast: Estimate) -> "Text":
    """Tells what is published of `fast` near the epochs that cost as much as the other recipe."""
    from rich.text import Text

    epochs = fast.timeline.epochs
    below = [known for known in FAST if known <= epochs][-1:]
    above = [known for known in FAST if known > epochs][:1]
    published = ", ".join(f"{FAST[known]:.2f}% at {known}" for known in (*below, *above))
    return Text(
        f"- fast with {epochs:.4g} epochs takes as long as {other.timeline.recipe.name}; "
        f"top-1 of fast (published: FFCV's logs, ResNet-50): {published} epochs"
    )


# Memory


def memory_table(steps: Sequence[StepMemory]) -> "Group":
    """Returns what rich prints: what a step takes, and which phases do not fit into the GPU."""
    from rich import box
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    card = steps[0].card_gib
    of = f"each of {steps[0].ranks} GPUs" if steps[0].ranks > 1 else "a single GPU"
    shown = Table(box=box.SIMPLE_HEAD)
    for key in (columns := [_memory_cells(step) for step in steps])[0]:
        shown.add_column(key, justify="left" if key == "phase" else "right")
    for row in columns:
        shown.add_row(*map(Text, row.values()))
    fits = f"; {card:g} GiB are there" if card else ""
    return Group(
        Text(f"memory of {of} in a step, counted on shapes{fits}", style="bold"),
        shown,
        *(Text(f"- {_overflow(step)}") for step in steps if step.overflows),
    )


def _memory_cells(step: StepMemory) -> dict[str, str]:
    fits = {"fits": "no" if step.overflows else "yes"} if step.card_gib else {}
    return {
        "phase": step.segment.phase.name,
        "px": str(step.segment.resolution),
        "micro-batch": f"{step.micro_batch:,}",
        "GiB": f"{step.bytes / 2**30:.1f}",
        "GFLOPs an image": f"{step.flops_per_image / 1e9:.3g}",
        **fits,
    }


def _overflow(step: StepMemory) -> str:
    name, largest = step.segment.phase.name, step.largest_micro_batch
    if largest is None:
        return f"{name}: not even one image fits: take a larger GPU or a smaller model"
    parts = math.ceil(step.share / largest)
    return (
        f"{name}: micro-batches of {largest:,} fit: --set "
        f"phases.{step.segment.phase_index}.grad_accum_steps={parts}; `train` finds out by itself"
    )


# All machines


def ranking(estimates: Sequence[Estimate]) -> "Group":
    """Returns what rich prints: a row a machine, the fastest first, with its rank by cost."""
    from rich import box
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    rows = list(_ranked(estimates))
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for key in rows[0]:
        words = key in ("machine", "GPUs", "bottleneck")
        table.add_column(key, justify="left" if words else "right", no_wrap=True)
    for row in rows:
        table.add_row(*map(Text, row.values()))
    first = estimates[0]
    nodes = f", {first.nodes} machines of each" if first.nodes > 1 else ""
    market = "spot" if first.spot else "on demand"
    title = f"{first.timeline.recipe.name}: time and cost by machine, {market}{nodes}"
    return Group(
        Text(title, style="bold"),
        table,
        *(Text(f"- {line}") for line in _claimed(estimates)),
        *_sources(estimates),
    )


def _claimed(estimates: Sequence[Estimate]) -> Iterator[str]:
    """Yields what somebody said of these machines, each claim once."""
    machines: dict[str, list[str]] = {}
    for estimate in estimates:
        for claim in _claims(estimate):
            said = f"{_claim(claim)} ({claim.source})"
            machines.setdefault(said, []).append(estimate.machine.name)
    yield from (f"claimed: {', '.join(names)}: {said}" for said, names in machines.items())


def ranking_json(estimates: Sequence[Estimate]) -> dict[str, Any]:
    """Returns the estimates, the fastest first, as plain data."""
    ranked = sorted(estimates, key=lambda each: each.seconds)
    claims = [
        {"machine": each.machine.name, **claim.model_dump(mode="json")}
        for each in ranked
        for claim in _claims(each)
    ]
    return {"machines": [as_json(each) for each in ranked], "claims": claims}


def _ranked(estimates: Sequence[Estimate]) -> Iterator[dict[str, str]]:
    by_cost = sorted(e.dollars for e in estimates if e.dollars is not None)
    for estimate in sorted(estimates, key=lambda e: e.seconds):
        machine, dollars = estimate.machine, estimate.dollars
        yield {
            "machine": machine.name,
            "GPUs": f"{machine.gpus} x {machine.gpu}" if machine.gpu else "none",
            "images/s": f"{estimate.images_per_second:,.0f}",
            "time": _hours(estimate.minutes),
            "$": _dollars(dollars).removeprefix("$"),
            "by $": UNKNOWN if dollars is None else str(by_cost.index(dollars) + 1),
            "bottleneck": estimate.bottleneck,
        }


def _hours(minutes: float) -> str:
    return in_words(minutes, "minutes") if minutes < 120 else f"{minutes / 60:.1f} h"


def _sources(estimates: Iterable[Estimate]) -> "list[Text]":
    """Returns the sources of all, each once, under a title."""
    from rich.text import Text

    sources = dict.fromkeys(source for each in estimates for source in each.sources)
    return [Text("\nsources", style="bold"), *(Text(f"- {source}") for source in sources)]


# A simulation


def simulated_table(estimate: Estimate, simulation: "Simulation") -> "Group":
    """Returns what rich prints: how time and cost are spread over the runs."""
    from rich import box
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    played, notes = simulation.as_json(), Footnotes()
    spread = Table("", box=box.SIMPLE_HEAD)
    for column in ("mean", "5%", "25%", "median", "75%", "95% within"):
        spread.add_column(column, justify="right")
    spread.add_row("minutes", *map(_short, played["minutes"].values()))
    if played["dollars"]:
        spread.add_row("dollars", *(f"{d:,.2f}" for d in played["dollars"].values()))
    spread.add_row("interruptions", *(f"{n:.2g}" for n in played["interruptions"].values()))
    title = (
        f"{estimate.timeline.recipe.name} on {_machine(estimate)}: {played['runs']:,} runs with "
        f"{played['interruptions_per_hour']:g} interruptions an hour"
    )
    lines = [
        f"{100 * played['without_interruption']:.3g}% are not interrupted and take "
        f"{in_words(played['undisturbed_minutes'], 'minutes')}",
        f"expected by the closed form: {in_words(estimate.minutes, 'minutes')}",
        f"checkpoints every {_time(estimate.interval_seconds)}, each "
        f"{_lasting(estimate.save, notes)}; each restart takes "
        f"{_lasting(estimate.restart, notes)}",
        _price(estimate, notes),
    ]
    return Group(
        Text(title, style="bold"),
        spread,
        *(Text(f"- {line}") for line in lines),
        *_footnotes(estimate, notes),
    )


# Words


def _claims(estimate: Estimate) -> list[Claim]:
    """Returns what somebody said of this recipe on this machine."""
    name = estimate.timeline.recipe.name
    return [claim for claim in estimate.machine.claims if claim.recipe == name]


def _claim(claim: Claim) -> str:
    low, high = claim.minutes
    span = f"{low:g} min" if low == high else f"{low:g} to {high:g} min"
    return f"{span}, ${claim.dollars:.2f}"


def _figure(figure: Figure, notes: Footnotes) -> str:
    return f"{figure.value:,.0f} {notes.mark(figure.source)}"


def _lasting(figure: Figure, notes: Footnotes) -> str:
    return f"{_time(figure.value)} {notes.mark(figure.source)}"


def _short(minutes: float) -> str:
    return in_words(minutes, "minutes").removesuffix(" min")


def _time(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds < 90 else in_words(seconds / 60, "minutes")


def _dollars(dollars: float | None) -> str:
    return UNKNOWN if dollars is None else in_words(dollars, "dollars")
