"""One screen of how runs go: a pure function of what was read, the time and the terminal's size.

Training is a line, validation dots.
"""

import functools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from pitstop.core.errors import InputError
from pitstop.core.exit_codes import BUDGET_SPENT, DIVERGED, FINISHED
from pitstop.core.recipe import parse_recipe
from pitstop.core.timeline import Timeline
from pitstop.io.records import Event
from pitstop.report.follow import Look, Mark, seconds_since_1970
from pitstop.report.terminal import DIM, Glyphs, clock, duration, lines, plot, row, spark
from pitstop.report.vitals import Gpu, Vitals

NARROWEST = 38
"""Columns of a run; where there are fewer, runs are rows of a table."""

SILENT_SECONDS = 180.0
"""A run that trains is heard every few seconds; an evaluation may take this long."""

RECENT = 30
"""Records of training, of two seconds or so, whose speed the remaining time is computed from."""

FINEST = 2000
"""Records of training that are plotted: hours have tens of thousands, and are drawn time and again.
"""

_TWO_PLOTS = 2 * NARROWEST - 2
"""Columns in which two plots stand side by side."""

_MOST_PLOT_ROWS = 16

_TABLE_FIGURES = 64
"""Columns of a table that are not for the names of runs."""

STYLES = {
    "running": "bold green",
    "finished": "bold green",
    "target met": "bold green",
    "diverged": "bold red",
    "not durable": "bold red",
}
"""Other states are yellow."""


# What is known of a run


@dataclass(frozen=True)
class Figures:
    """A run in figures; None is what is not known."""

    status: str
    step: int
    steps: int | None
    epoch: float
    epochs: float | None
    train: list[Event]
    vals: list[Event]
    images_per_second: float | None
    wait_share: float | None
    elapsed: float
    remaining: float | None
    """Seconds of training and evaluation to come; None too where the run does not go on."""
    heard: float | None
    """Seconds since the last record."""

    @property
    def last(self) -> Event | None:
        """The latest record that says what the settings are."""
        both = [*self.train[-1:], *self.vals[-1:]]
        return max(both, key=lambda event: event["step"], default=None)

    @property
    def best(self) -> Event | None:
        return max(self.vals, key=lambda event: event["top1"], default=None)


def is_over(look: Look) -> bool:
    """Says whether a run has ended for good: nothing starts it again by itself."""
    over = (FINISHED, DIVERGED, BUDGET_SPENT)
    return look.state.get("exit_code") in over


def figures(look: Look, now: float) -> Figures:
    """Returns the figures of a run at a time (seconds since 1970)."""
    events, state = look.events, look.state
    train = [event for event in events if event["kind"] == "train" and event["images"]]
    vals = [event for event in events if event["kind"] == "val"]
    times = [event["time"] for event in events[-RECENT:] if "time" in event]
    heard = max(0.0, now - seconds_since_1970(times[-1])) if times else None
    status = state.get("status", "starting")
    if status == "running" and heard is not None and heard > SILENT_SECONDS:
        status = "silent"
    step = max([state.get("step") or 0, *(event["step"] for event in (*train[-1:], *vals[-1:]))])
    recent = _recent(train)
    seconds = sum(event["seconds"] for event in recent)
    return Figures(
        status=status,
        step=step,
        steps=state.get("steps"),
        epoch=max([state.get("epoch") or 0.0, *(e["epoch"] for e in (*train[-1:], *vals[-1:]))]),
        epochs=state.get("epochs"),
        train=train,
        vals=vals,
        images_per_second=sum(e["images"] for e in recent) / seconds if seconds else None,
        wait_share=sum(e["wait_seconds"] for e in recent) / seconds if seconds else None,
        elapsed=max((event["wall_seconds"] for event in events[-RECENT:]), default=0.0),
        remaining=_remaining(state, train, vals, step) if status == "running" else None,
        heard=heard,
    )


def _recent(train: list[Event]) -> list[Event]:
    """Returns the last records of training of the same shapes."""
    last = train[-RECENT:]
    keys = ("phase", "resolution", "batch_size")
    return [event for event in last if all(event[key] == last[-1][key] for key in keys)]


def _remaining(
    state: dict[str, Any], train: list[Event], vals: list[Event], step: int
) -> float | None:
    """Returns the seconds of training and evaluation that are left.

    An image costs in proportion to its pixels. Where the plan cannot be made again, as after an
    amendment, a step costs what it does now.
    """
    recent, steps = _recent(train), state.get("steps")
    if not recent or steps is None:
        return None
    seconds = sum(event["seconds"] for event in recent)
    timeline = _timeline(state, train[0])
    if timeline is None:
        done = sum(event["step"] - event["first"] for event in recent)
        return (steps - step) * seconds / done
    images = sum(event["images"] for event in recent)
    pixels = sum(
        len(segment.steps_from(step)) * segment.batch_size * segment.resolution**2
        for segment in timeline.segments_from(step)
    )
    evaluations = sum(at > step for at in timeline.evaluations)
    each = vals[-1]["seconds"] if vals else 0.0
    return pixels / recent[-1]["resolution"] ** 2 * seconds / images + evaluations * each


def _timeline(state: dict[str, Any], first: Event) -> Timeline | None:
    """Returns the plan of the run, if the recipe alone leads to it.

    The number of images is not recorded, but follows from the epochs that the first ones were.
    """
    recipe = state.get("recipe")
    if recipe is None or first["first"] != 0 or not first["epoch"]:
        return None
    fraction = recipe["phases"][0]["data_fraction"]
    samples = round(first["images"] / first["epoch"] / fraction)
    timeline = _planned(json.dumps(recipe), samples)
    return timeline if timeline is not None and timeline.last == state["steps"] else None


@functools.lru_cache
def _planned(recipe: str, samples: int) -> Timeline | None:
    try:
        return Timeline.planned(parse_recipe(json.loads(recipe), "run.json"), samples)
    except InputError:  # of another version of pitstop
        return None


# The screen


def screen(
    looks: Sequence[Look],
    vitals: Vitals | None,
    *,
    width: int,
    height: int,
    now: float,
    ascii_only: bool = False,
) -> RenderableType:
    """Returns runs side by side, or as a table where that is too narrow, above the vitals.

    Args:
        looks: what was read of each run.
        vitals: of the machine where one of them runs, None where it is another.
        width, height: of the terminal, in characters; no row is wider, and there are no more.
        now: seconds since 1970.
        ascii_only: whether the terminal shows nothing else.
    """
    glyphs = Glyphs(ascii_only)
    below = [] if vitals is None else _vitals(vitals, width, glyphs)
    each = (width - 2 * (len(looks) - 1)) // len(looks)
    left = height - len(below)
    if each < NARROWEST and len(looks) > 1:
        return Group(_table(looks, width, left, now, glyphs), *below)
    columns = [_column(look, each, left, now, glyphs) for look in looks]
    side_by_side = Table.grid(padding=(0, 2), pad_edge=False)
    for _ in columns:
        side_by_side.add_column(width=each, no_wrap=True)
    side_by_side.add_row(*(Group(*rows) for rows in columns))
    return Group(side_by_side, *below)


def _column(look: Look, width: int, height: int, now: float, glyphs: Glyphs) -> list[Text]:
    """Returns the rows of a run: what is said first, the curves, the last lines of its log."""
    known = figures(look, now)
    above = [
        _title(look, known, width, glyphs),
        _bar(known, width, glyphs),
        *lines(_where(look, known, glyphs), width, glyphs),
        *lines(_kept(look, known, now, glyphs), width, glyphs),
        *lines(_cost(look, known, glyphs), width, glyphs),
    ]
    if known.train:
        above.append(_lr_row(known, width, glyphs))
    if look.problem is not None:
        above.append(row(glyphs.clean(look.problem), width, glyphs, "yellow"))
    left = height - len(above)
    log = _log(look.events, max(2, left // 4), width, glyphs)
    curves = _curves(known, width, left - len(log), glyphs)
    more = left - len(curves)
    return [*above, *curves, *_log(look.events, max(0, more), width, glyphs)][:height]


def _title(look: Look, known: Figures, width: int, glyphs: Glyphs) -> Text:
    heard = ""
    if known.heard is not None:
        age = duration(known.heard)
        heard = f" for {age}" if known.status == "silent" else f", heard {age} ago"
    status = glyphs.clean(known.status)
    room = width - len(status) - len(heard) - 2
    return Text.assemble(
        (_name(look, room, glyphs), "bold"),
        "  ",
        (status, STYLES.get(known.status, "bold yellow")),
        (heard, DIM),
        no_wrap=True,
        overflow="crop",
    )


def _name(look: Look, room: int, glyphs: Glyphs) -> str:
    """Returns the end of a run's name: what it has not in common with others."""
    name = glyphs.clean(look.name)
    return name if len(name) <= room else f"{glyphs.ellipsis}{name[-max(1, room - 1) :]}"


def _bar(known: Figures, width: int, glyphs: Glyphs) -> Text:
    """Returns the progress bar, the time that has passed and the time to go."""
    share = known.step / known.steps if known.steps else 0.0
    eta = "" if known.remaining is None else f", ETA {clock(known.remaining)}"
    label = f" {math.floor(100 * share):3d}%  {clock(known.elapsed)}{eta}"
    room = max(0, width - len(label))
    full = round(min(1.0, share) * room)
    done, to_do = glyphs.bar
    return Text.assemble((done * full, "green"), (to_do * (room - full), DIM), label, no_wrap=True)


def _where(look: Look, known: Figures, glyphs: Glyphs) -> list[str]:
    """Returns where the run is, and how fast."""
    steps = "?" if known.steps is None else f"{known.steps:,}"
    epochs = "?" if known.epochs is None else _epochs(known.epochs)
    facts = [f"step {known.step:,}/{steps}", f"epoch {known.epoch:.2f}/{epochs}"]
    last = known.last
    if last is not None:
        facts.append(f"phase {glyphs.clean(last['phase'])}")
        facts += [f"{last['resolution']} px", f"batch {last['batch_size']:,}"]
    if known.images_per_second is not None:
        facts.append(f"{known.images_per_second:,.0f} images/s")
    if known.wait_share is not None:
        facts.append(f"data wait {known.wait_share:.0%}")
    busy = known.train[-1].get("utilization") if known.train else None
    if busy is not None:
        facts.append(f"GPU {busy:.0f}%")
    if known.vals:
        facts.append(f"{known.vals[-1]['memory_mb'] / 1000:.2f} GB")
    if known.best is not None:
        facts.append(f"best {known.best['top1']:.2f}% at epoch {_epochs(known.best['epoch'])}")
    return facts


def _epochs(value: float) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".")


def _kept(look: Look, known: Figures, now: float, glyphs: Glyphs) -> list[str]:
    """Returns which checkpoints there are."""
    saved = _marked(look.saved, now)
    facts = [f"saved {saved}" if saved else "nothing saved yet"]
    if look.saved is not None and known.step > look.saved.step:
        facts.append(f"{known.step - look.saved.step:,} steps since")
    durable = _marked(look.durable, now)
    return [*facts, f"in the bucket {durable}" if durable else "no copy in a bucket"]


def _marked(mark: Mark | None, now: float) -> str | None:
    if mark is None:
        return None
    age = "" if mark.time is None else f", {duration(max(0.0, now - mark.time))} ago"
    return f"step {mark.step:,}{age}"


def _cost(look: Look, known: Figures, glyphs: Glyphs) -> list[str]:
    """Returns what the run has cost, and will, and where it runs."""
    when = "in all" if is_over(look) else "so far"
    facts = ["cost unknown (no --price)" if look.spent is None else f"${look.spent:.2f} {when}"]
    price = look.starts[-1]["price"] if look.starts else None
    if look.spent is not None and price is not None and known.remaining is not None:
        facts.append(f"${look.spent + price * known.remaining / 3600:.2f} at the end")
    starts, (lost, seconds) = len(look.starts), look.lost
    if starts > 1:
        facts.append(f"{starts} starts, {clock(look.seconds)}")
    if lost:
        facts.append(f"{lost:,} steps ({duration(seconds)}) done twice")
    if look.starts:
        last = look.starts[-1]
        ranks = f"{last['world']} x " if last["world"] > 1 else ""
        facts.append(glyphs.clean(f"{ranks}{last['machine'] or 'machine'} on {last['host']}"))
    return facts


def _lr_row(known: Figures, width: int, glyphs: Glyphs) -> Text:
    lr = known.train[-1]["lr"]
    label = f"lr {lr:.3g} "
    values = [(event["epoch"], event["lr"]) for event in _thinned(known.train)]
    return Text.assemble(label, (spark(values, max(1, width - len(label)), glyphs), "magenta"))


def _log(events: Sequence[Event], rows: int, width: int, glyphs: Glyphs) -> list[Text]:
    """Returns the last lines that the run has said, as many as there are rows."""
    said: list[str] = []
    for event in reversed(events):
        if len(said) == rows:
            break
        text = _said(event)
        if text is not None:
            said.append(f"{event['time'][11:16]}Z {text}")
    return [row(glyphs.clean(line), width, glyphs, DIM) for line in reversed(said)]


def _said(event: Event) -> str | None:
    """Returns what a line of the log says of an event, None of those that have no line."""
    if event["kind"] == "note":
        return str(event["text"]).removeprefix("-- ")
    if event["kind"] == "val":
        return f"epoch {event['epoch']:.2f}: val {event['top1']:.2f}%, loss {event['loss']:.4f}"
    if event["kind"] == "durable":
        return f"step {event['step']} is in the bucket, {duration(event['age_seconds'])} old"
    return None


def _table(
    looks: Sequence[Look], width: int, height: int, now: float, glyphs: Glyphs
) -> RenderableType:
    """Returns a row for each run."""
    ruled = box.ASCII if glyphs.ascii_only else box.SIMPLE_HEAD
    table = Table(box=ruled, show_edge=False, padding=(0, 1, 0, 0), width=width)
    table.add_column("run", no_wrap=True, overflow="crop", ratio=1)
    for name in ("state", "done", "ETA", "epoch", "loss", "val", "best", "img/s", "cost"):
        table.add_column(name, no_wrap=True, overflow="crop", justify="right")
    fits = height - 2 if len(looks) <= height - 2 else height - 3
    for look in looks[:fits]:
        name = Text(_name(look, width - _TABLE_FIGURES, glyphs), "bold")
        table.add_row(name, *_cells(look, figures(look, now), glyphs))
    if len(looks) <= fits:
        return table
    return Group(table, row(f"and {len(looks) - fits} more", width, glyphs, DIM))


def _cells(look: Look, known: Figures, glyphs: Glyphs) -> list[Text]:
    share = f"{100 * known.step // known.steps}%" if known.steps else "?"
    speed = known.images_per_second
    loss = _loss(known.train[-1]) if known.train else math.nan
    words = [
        share,
        "" if known.remaining is None else clock(known.remaining),
        f"{known.epoch:.1f}",
        f"{loss:.3g}" if known.train else "",
        f"{known.vals[-1]['top1']:.2f}" if known.vals else "",
        f"{known.best['top1']:.2f}" if known.best else "",
        "" if speed is None else f"{speed:,.0f}",
        "" if look.spent is None else f"${look.spent:.2f}",
    ]
    status = Text(glyphs.clean(known.status), STYLES.get(known.status, "bold yellow"))
    return [status, *map(Text, words)]


def _vitals(vitals: Vitals, width: int, glyphs: Glyphs) -> list[Text]:
    """Returns the rows about this machine."""
    busy = "" if vitals.cpu is None else f"{vitals.cpu:.0f}%, "
    facts = [f"here: CPU {busy}load {vitals.load:.1f} of {vitals.cores}"]
    if vitals.memory_used is not None and vitals.memory_total is not None:
        facts.append(f"memory {_gb(vitals.memory_used)}/{_gb(vitals.memory_total)} GB")
    facts.append(f"disk {_gb(vitals.disk_free)} of {_gb(vitals.disk_total)} GB free")
    return lines([*facts, *_gpus(vitals.gpus)], width, glyphs, DIM)


def _gpus(gpus: Sequence[Gpu]) -> list[str]:
    """Returns each of one or two GPUs, or all in one."""
    if len(gpus) > 2:
        told = f"{len(gpus)} GPUs: {_span([gpu.busy for gpu in gpus])}% busy"
        told += f", {_span([_in_gb(gpu.memory_used) for gpu in gpus])} GB"
        return [f"{told}, {_span([gpu.power for gpu in gpus])} W"]
    return [
        f"GPU {gpu.index}: {_known(gpu.busy)}%, "
        f"{_known(_in_gb(gpu.memory_used))}/{_known(_in_gb(gpu.memory_total))} GB, "
        f"{_known(gpu.power)}/{_known(gpu.power_limit)} W"
        for gpu in gpus
    ]


def _span(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{min(known):.0f}-{max(known):.0f}" if known else "?"


def _known(value: float | None) -> str:
    return "?" if value is None else f"{value:.0f}"


def _in_gb(value: float | None) -> float | None:
    return None if value is None else value / 1e9


def _gb(value: float) -> str:
    return f"{value / 1e9:.3g}" if value < 1e12 else f"{value / 1e9:.0f}"


# Curves


def _curves(known: Figures, width: int, height: int, glyphs: Glyphs) -> list[Text]:
    """Returns top-1 and loss: side by side where there is room, else one above the other."""
    if not (known.train or known.vals):
        return []
    height = min(height, _MOST_PLOT_ROWS if width >= _TWO_PLOTS else 2 * _MOST_PLOT_ROWS)
    train = _thinned(known.train)
    top1 = [(e["epoch"], 100 * e["top1"] / e["images"]) for e in train]
    loss = [(e["epoch"], _loss(e)) for e in train]
    val_top1 = [(e["epoch"], e["top1"]) for e in known.vals]
    val_loss = [(e["epoch"], e["loss"]) for e in known.vals]
    most = 2 * loss[0][1] if loss and math.isfinite(loss[0][1]) else math.inf
    if width >= _TWO_PLOTS:
        each = (width - 2) // 2
        left = plot("top-1", "%", top1, val_top1, each, height, glyphs)
        right = plot("loss", "", loss, val_loss, each, height, glyphs, most)
        return [_beside(a, b, each) for a, b in zip(left, right, strict=True)]
    above = plot("top-1", "%", top1, val_top1, width, height - height // 2, glyphs)
    return [*above, *plot("loss", "", loss, val_loss, width, height // 2, glyphs, most)]


def _thinned(train: list[Event]) -> list[Event]:
    """Returns about FINEST of the records, the last of them included."""
    return train[:: -(1 + len(train) // FINEST)][::-1]


def _loss(event: Event) -> float:
    return event["loss"] / event["images"]


def _beside(left: Text, right: Text, width: int) -> Text:
    pad = " " * (width - left.cell_len + 2)
    return Text.assemble(left, pad, right, no_wrap=True, overflow="crop")
