"""What a run's records say of it, for the page: its curves, phases, starts, speed and cost."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import TypeAdapter, ValidationError

from pitstop.core.errors import InputError
from pitstop.io.ledger import Alive, End, Line, Start
from pitstop.io.records import Event, read_events, rows
from pitstop.io.run_directory import RunDirectory
from pitstop.report.plots import History, Series, history_of
from pitstop.report.predictions import PREDICTIONS, Predictions, read_predictions

Array = NDArray[np.float64]
AXES = ("epoch", "minutes", "dollars")

_LINE: TypeAdapter[Line] = TypeAdapter(Line)


@dataclass(frozen=True)
class Process:
    """A start of the run and what came of it.

    `began` and `dollars_before` are the minutes and dollars of the whole run at its begin; dollars
    are 0 where no price is known.
    """

    start: Start
    seconds: float
    step: int
    ended: str
    price: float | None
    began: float = 0.0
    dollars_before: float = 0.0

    @property
    def dollars(self) -> float:
        return self.seconds * (self.price or 0.0) / 3600


@dataclass(frozen=True)
class Stretch:
    """The steps of a run in one phase at one resolution and batch size, as they were recorded."""

    phase: str
    resolution: int
    batch_size: int
    steps: int
    images: int
    seconds: float
    wait_seconds: float


@dataclass(frozen=True)
class Facts:
    """A run, as the page shows it."""

    name: str
    state: dict[str, Any]
    """What run.json says."""
    events: list[Event]
    history: History
    processes: tuple[Process, ...]
    predictions: Predictions | None

    @property
    def priced(self) -> bool:
        """Whether the price of each start is known."""
        return bool(self.processes) and all(p.price is not None for p in self.processes)

    @property
    def dollars(self) -> float:
        """What the starts have cost whose price is known."""
        return sum(process.dollars for process in self.processes)

    @property
    def seconds(self) -> float:
        """How long the run's processes have run."""
        recorded = max((event["wall_seconds"] for event in self.events), default=0.0)
        return max(recorded, sum(process.seconds for process in self.processes))


def read_facts(run: RunDirectory, price: float | None = None) -> Facts:
    """Reads a run.

    Args:
        run: where.
        price: in dollars an hour, of the starts whose own is not known.

    Raises:
        InputError: there is no run, or its predictions are damaged.
    """
    state = run.read()
    if state is None and not run.events.exists():
        raise InputError(f"{run.path}: holds no run: name a run directory, or its URL")
    name, events = run.path.resolve().name, read_events(run.events)
    return Facts(
        name=name,
        state=state or {},
        events=events,
        history=history_of(name, events),
        processes=_placed(_read_processes(run.ledger, price), events),
        predictions=read_predictions(run.path / PREDICTIONS),
    )


# Starts


def _read_processes(ledger: Path, price: float | None) -> list[Process]:
    """Returns the starts in a ledger, in their order; a damaged line is none."""
    starts: dict[str, Start] = {}
    marks: dict[str, list[Alive | End]] = {}
    for text in ledger.read_bytes().splitlines() if ledger.exists() else []:
        try:
            line = _LINE.validate_json(text)
        except ValidationError:
            continue
        if isinstance(line, Start):
            starts.setdefault(line.id, line)
        else:
            marks.setdefault(line.id, []).append(line)
    last = next(reversed(starts), None)
    return [
        _process(start, marks.get(id_, []), price, is_last=id_ == last)
        for id_, start in starts.items()
    ]


def _process(
    start: Start, marks: Sequence[Alive | End], price: float | None, *, is_last: bool
) -> Process:
    ends = [mark.status for mark in marks if isinstance(mark, End)]
    return Process(
        start=start,
        seconds=max((mark.seconds for mark in marks), default=0.0),
        step=max((mark.step for mark in marks), default=start.step),
        ended=ends[-1] if ends else ("running, or killed" if is_last else "killed"),
        price=price if start.price is None else start.price,
    )


def _placed(processes: Sequence[Process], events: Sequence[Event]) -> tuple[Process, ...]:
    """Returns the starts with the time and cost of the run before them.

    The records know when a start began, unless what it did was cut off; then it began when the one
    before had ended.
    """
    recorded = _recorded_begins(processes, events)
    placed: list[Process] = []
    minutes = dollars = 0.0
    for process in processes:
        before = placed[-1].began if placed else 0.0
        began = max(before, recorded.get(process.start.id, minutes))
        placed.append(replace(process, began=began, dollars_before=dollars))
        minutes, dollars = began + process.seconds / 60, dollars + process.dollars
    return tuple(placed)


def _recorded_begins(processes: Sequence[Process], events: Sequence[Event]) -> dict[str, float]:
    """Returns the minutes of the run at which starts began, by their id.

    Each `start` event, whose time is cut to seconds, is that of the latest start before it.
    """
    begins: dict[str, float] = {}
    for event in (event for event in events if event["kind"] == "start"):
        time = datetime.fromisoformat(event["time"]) + timedelta(seconds=1)
        before = [p for p in processes if datetime.fromisoformat(p.start.time) < time]
        if before:
            begins[before[-1].start.id] = event["wall_seconds"] / 60
    return begins


# Curves: columns by name, each of the same length, None where there is no number


def curves(facts: Facts) -> dict[str, Any]:
    """Returns what the page draws of a run, as plain data.

    `train` and `val` are columns; a column `dollars` is there where the cost is known. `phases`
    and `marks` (starts after the first) have their places by axis.
    """
    history = facts.history
    speed = [row.images_per_second for row in rows(facts.events)]
    return {
        "name": facts.name,
        "train": _columns(facts, history.train, ("top1", "loss", "lr")),
        "val": {**_columns(facts, history.val, ("top1", "top5", "loss")), "speed": speed},
        "phases": list(_phases(facts)),
        "marks": [_mark(facts, before, after) for before, after in pairwise(facts.processes)],
    }


def _columns(facts: Facts, series: Series, keys: tuple[str, ...]) -> dict[str, Any]:
    columns = {key: _numbers(getattr(series, key)) for key in (*keys, "epoch", "minutes")}
    if facts.priced:
        columns["dollars"] = _numbers(_dollars(facts, series.minutes))
    return columns


def _numbers(values: Array) -> list[float | None]:
    return [float(f"{value:.6g}") if math.isfinite(value) else None for value in values]


def _dollars(facts: Facts, minutes: Array) -> Array:
    """Returns what the run had cost after so many minutes."""
    last = facts.processes[-1]
    at = [*(p.began for p in facts.processes), last.began + last.seconds / 60]
    costs = [*(p.dollars_before for p in facts.processes), facts.dollars]
    return np.interp(minutes, at, costs)


def _places(facts: Facts, epoch: float, minutes: float) -> dict[str, float]:
    places = {"epoch": epoch, "minutes": minutes}
    if facts.priced:
        places["dollars"] = float(_dollars(facts, np.array([minutes]))[0])
    return places


def _phases(facts: Facts) -> Iterator[dict[str, Any]]:
    """Yields the phases that were trained: their names, and where they begin and end."""
    begin = _places(facts, 0.0, 0.0)
    series = facts.history.settings
    trained = zip(series.phase, series.epoch, series.minutes, strict=True)
    for name, group in groupby(trained, key=lambda point: point[0]):
        *_, (_, epoch, minutes) = group
        end = _places(facts, float(epoch), float(minutes))
        yield {"name": name, **{axis: [begin[axis], end[axis]] for axis in end}}
        begin = end


def _mark(facts: Facts, before: Process, after: Process) -> dict[str, Any]:
    points = [(e["step"], e["epoch"]) for e in facts.events if e["kind"] in ("train", "val")]
    steps, epochs = zip((0, 0.0), *points, strict=True)
    epoch = float(np.interp(after.start.step, steps, epochs))
    lost = f", {after.start.lost_steps:,} done again" if after.start.lost_steps else ""
    text = f"{before.ended}; started again at step {after.start.step:,}{lost}"
    return {"text": text, **_places(facts, epoch, after.began)}


# Speed


def stretches(facts: Facts) -> list[Stretch]:
    """Returns how fast each part of the run was trained."""

    def kind(event: Event) -> tuple[str, int, int]:
        return event["phase"], event["resolution"], event["batch_size"]

    trained = [event for event in facts.events if event["kind"] == "train"]
    return [_stretch(*of, list(group)) for of, group in groupby(trained, key=kind)]


def _stretch(phase: str, resolution: int, batch_size: int, events: list[Event]) -> Stretch:
    return Stretch(
        phase=phase,
        resolution=resolution,
        batch_size=batch_size,
        steps=sum(event["step"] - event["first"] for event in events),
        images=sum(event["images"] for event in events),
        seconds=sum(event["seconds"] for event in events),
        wait_seconds=sum(event["wait_seconds"] for event in events),
    )


def training_images(facts: Facts) -> int | None:
    """Returns how many images an epoch has, None where nothing was recorded.

    The images that were trained on, over the part of an epoch that they came to, in the first
    stretch of events from the begin on.
    """
    recipe = facts.state.get("recipe") or {}
    fraction = (recipe.get("phases") or [recipe])[0].get("data_fraction", 1.0)
    first = next((e for e in facts.events if e["kind"] == "train" and e["first"] == 0), None)
    if first is None or not first["epoch"]:
        return None
    return round(first["images"] / first["epoch"] / fraction)
