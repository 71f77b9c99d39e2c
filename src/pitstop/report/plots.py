"""Plots of a run, drawn from its records: `python -m pitstop.report.plots RUN_DIRECTORY`.

Colour says which quantity (Okabe and Ito's palette, safe for the colour-blind), the kind of line
says which data: validation is solid with dots, training thin and lighter.
"""

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure, FigureBase, SubFigure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator
from numpy.typing import NDArray

from pitstop.io.pictures import (
    BLUE,
    GREEN,
    GREY,
    INK,
    ORANGE,
    PURPLE,
    RED,
    SINGLE,
    SKY,
    STYLE,
    save,
)
from pitstop.io.records import Event, read_events
from pitstop.io.run_directory import RunDirectory
from pitstop.report import lr_curve

OVERVIEW = (13.0, 7.4)
FINEST = 240
"""Points of a training curve: more is noise rather than detail."""

XAxis = Literal["epoch", "minutes"]
X_LABELS: dict[XAxis, str] = {"epoch": "epoch", "minutes": "wall time [min]"}
Array = NDArray[np.float64]


@dataclass(frozen=True)
class Series:
    """Measurements in the order of time, each of shape (n,); accuracies are percentages."""

    phase: tuple[str, ...]
    epoch: Array
    minutes: Array
    loss: Array
    top1: Array
    top5: Array
    lr: Array
    momentum: Array
    resolution: Array
    batch_size: Array


@dataclass(frozen=True)
class History:
    """What a run has recorded so far."""

    name: str
    settings: Series
    """As finely as training was recorded."""
    train: Series
    """At most about FINEST points."""
    val: Series
    images_per_second: float
    """Of training alone; NaN where nothing was trained."""

    def best(self) -> int | None:
        """Returns the place in `val` of the first best top-1, None without any."""
        return int(np.nanargmax(self.val.top1)) if np.isfinite(self.val.top1).any() else None


def read_history(run: RunDirectory) -> History:
    """Returns what the run's events say."""
    return history_of(run.path.resolve().name, read_events(run.events))


def history_of(name: str, events: Sequence[Event]) -> History:
    """Returns what some events of a run say."""
    train = [event for event in events if event["kind"] == "train" and event["images"]]
    seconds = sum(event["seconds"] for event in train)
    return History(
        name=name,
        settings=_series([_merged([event]) for event in train]),
        train=_series([_merged(some) for some in _bins(train)]),
        val=_series([event for event in events if event["kind"] == "val"]),
        images_per_second=sum(e["images"] for e in train) / seconds if seconds else math.nan,
    )


def _bins(events: list[Event]) -> Iterator[list[Event]]:
    """Yields stretches of events of about equal length, none across two phases."""
    size = math.ceil(len(events) / FINEST)
    for _, group in groupby(events, key=lambda event: event["phase"]):
        same = list(group)
        yield from (same[i : i + size] for i in range(0, len(same), size))


def _merged(events: list[Event]) -> Event:
    """Returns the last of the events, with the means of all and accuracies as percentages."""
    images = sum(event["images"] for event in events)
    return events[-1] | {
        "loss": sum(event["loss"] for event in events) / images,
        "top1": 100 * sum(event["top1"] for event in events) / images,
        "top5": 100 * sum(event["top5"] for event in events) / images,
    }


def _series(events: list[Event]) -> Series:
    def column(key: str) -> Array:
        values = np.array([event[key] for event in events], dtype=np.float64)
        return np.where(np.isfinite(values), values, np.nan)

    return Series(
        phase=tuple(event["phase"] for event in events),
        epoch=column("epoch"),
        minutes=column("wall_seconds") / 60,
        loss=column("loss"),
        top1=column("top1"),
        top5=column("top5"),
        lr=column("lr"),
        momentum=column("momentum"),
        resolution=column("resolution"),
        batch_size=column("batch_size"),
    )


# Panels: each draws into a figure or a part of one


def accuracy(figure: FigureBase, history: History, x: XAxis) -> None:
    """Draws top-1 and top-5 of training and validation, and marks the best."""
    axes = figure.subplots()
    _curves(axes, history, x, "top1", "top-1", BLUE)
    _curves(axes, history, x, "top5", "top-5", ORANGE)
    axes.set_ylabel("accuracy [%]")
    axes.set_ylim(top=min(101.0, axes.get_ylim()[1]))
    _mark_best(axes, history, x)
    axes.legend(loc="best")
    _frame(axes, history, x)


def loss(figure: FigureBase, history: History, x: XAxis) -> None:
    """Draws the loss of training and validation; a diverged one leaves at the top."""
    axes = figure.subplots()
    _curves(axes, history, x, "loss", "loss", RED)
    axes.set_ylabel("loss [nats]")
    _cut_divergence(axes, history)
    axes.legend(loc="best")
    _frame(axes, history, x)


def _cut_divergence(axes: Axes, history: History) -> None:
    """Ends the axis at twice the loss that training began with."""
    train = history.train.loss[np.isfinite(history.train.loss)]
    values = np.concatenate([train, history.val.loss[np.isfinite(history.val.loss)]])
    if len(train) and values.max() > 2 * train[0]:
        axes.set_ylim(0.9 * values.min(), 2 * train[0])


def lr(figure: FigureBase, history: History) -> None:
    """Draws the learning rate."""
    _setting(figure.subplots(), history, "lr", "learning rate", GREEN)


def momentum(figure: FigureBase, history: History) -> None:
    """Draws the momentum."""
    _setting(figure.subplots(), history, "momentum", "momentum", PURPLE)


def resolution(figure: FigureBase, history: History) -> None:
    """Draws the resolution above the batch size."""
    above, below = figure.subplots(2, 1, sharex=True)
    _structure(above, history, "resolution", "resolution [px]", SKY)
    _structure(below, history, "batch_size", "batch [images]", INK)
    _frame(above, history, "epoch")
    _frame(below, history, "epoch", named=False)
    above.set_xlabel("")
    figure.align_ylabels()


def _curves(axes: Axes, history: History, x: XAxis, key: str, label: str, colour: str) -> None:
    """Draws `key` of training and validation, each where there is any of it."""
    val, train = history.val, history.train
    if len(val.epoch):
        mark = "o" if len(val.epoch) <= 40 else ""
        bold = {"color": colour, "linewidth": 1.8, "marker": mark, "markersize": 3, "zorder": 3}
        axes.plot(getattr(val, x), getattr(val, key), label=f"val {label}", **bold)
    if len(train.epoch):
        mark = "." if len(train.epoch) == 1 else ""  # one point makes no line
        thin = {"color": colour, "linewidth": 1.0, "marker": mark, "alpha": 0.55, "zorder": 2}
        axes.plot(getattr(train, x), getattr(train, key), label=f"train {label}", **thin)


def _mark_best(axes: Axes, history: History, x: XAxis) -> None:
    """Rings the best top-1; its value stands in the legend, where it hides no curve."""
    best = history.best()
    if best is None:
        return
    at, top1 = getattr(history.val, x)[best], history.val.top1[best]
    where = f"epoch {at:.4g}" if x == "epoch" else f"after {_duration(at)}"
    ring = {"markersize": 8, "markerfacecolor": "white", "markeredgewidth": 1.5, "zorder": 4}
    label = f"best val top-1: {top1:.2f}%, {where}"
    axes.plot(at, top1, "o", color=BLUE, label=label, **ring)


def _setting(axes: Axes, history: History, key: str, label: str, colour: str) -> None:
    mark = "." if len(history.settings.epoch) == 1 else ""
    xs, ys = history.settings.epoch, getattr(history.settings, key)
    axes.plot(xs, ys, color=colour, linewidth=1.8, marker=mark)
    axes.set_ylabel(label)
    _frame(axes, history, "epoch")


def _structure(axes: Axes, history: History, key: str, label: str, colour: str) -> None:
    """Draws what holds for stretches of the run; the ticks are the values themselves."""
    values: Array = getattr(history.settings, key)
    edges = np.concatenate([[0.0], history.settings.epoch])
    axes.stairs(values, edges, baseline=None, color=colour, linewidth=2.2)
    distinct = np.unique(values)
    axes.set_ylim(0, 1.2 * max(distinct, default=1))
    axes.yaxis.set_major_locator(FixedLocator(_apart(distinct)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.set_ylabel(label)


def _apart(values: Array) -> list[float]:
    """Returns those of the ascending values whose labels do not overlap, the largest first."""
    kept: list[float] = []
    for value in values[::-1]:
        if not kept or kept[-1] - value > 0.13 * values[-1]:
            kept.append(float(value))
    return kept


def _frame(axes: Axes, history: History, x: XAxis, *, named: bool = True) -> None:
    """Labels the axis of time and shades every second phase, each under its name."""
    axes.set_xlabel(X_LABELS[x])
    ends = [getattr(s, x)[-1:] for s in (history.settings, history.val)]
    end = float(max(np.concatenate(ends), default=1.0))
    axes.set_xlim(0, end * 1.02)
    phases = list(_phases(history.settings, x))
    if len(phases) < 2:
        return
    inches = (OVERVIEW[0] / 3 if isinstance(axes.figure, SubFigure) else SINGLE[0]) - 0.9
    for i, (name, begin, until) in enumerate(phases):
        if i % 2:
            axes.axvspan(begin, until, color="#000000", alpha=0.05, linewidth=0, zorder=0)
        room = int((until - begin) / end * inches / 0.075)
        if named and room >= min(len(name), 6):
            text = name if len(name) <= room else name[: room - 1] + "…"
            middle = (begin + until) / 2
            place = {"xycoords": axes.get_xaxis_transform(), "textcoords": "offset points"}
            small = {"ha": "center", "fontsize": 8, "color": GREY}
            axes.annotate(text, (middle, 1.0), xytext=(0, 3), **place, **small)


def _phases(settings: Series, x: XAxis) -> Iterator[tuple[str, float, float]]:
    """Yields the name, the begin and the end of each phase."""
    begin = 0.0
    pairs = zip(settings.phase, getattr(settings, x), strict=True)
    for name, group in groupby(pairs, key=lambda pair: pair[0]):
        *_, (_, end) = group
        yield name, begin, float(end)
        begin = float(end)


# Files


Panel = Callable[[FigureBase, History], None]
PANELS: dict[str, tuple[str, Panel]] = {
    "accuracy_epochs": ("accuracy", lambda figure, h: accuracy(figure, h, "epoch")),
    "accuracy_minutes": ("accuracy over time", lambda figure, h: accuracy(figure, h, "minutes")),
    "loss_epochs": ("loss", lambda figure, h: loss(figure, h, "epoch")),
    "loss_minutes": ("loss over time", lambda figure, h: loss(figure, h, "minutes")),
    "lr": ("learning rate", lr),
    "momentum": ("momentum", momentum),
    "resolution": ("resolution and batch size", resolution),
}
"""Name of the file to the title and what draws it."""
DASHBOARD = ("accuracy_epochs", "accuracy_minutes", "loss_epochs", "lr", "momentum", "resolution")


def draw(run: RunDirectory) -> list[Path]:
    """Draws `run.plots/*.png`, and the search for the lr, from the run's records.

    Before the first record there is nothing to draw, and nothing is written.

    Returns:
        What it wrote.
    """
    written = lr_curve.draw_new(run)
    history = read_history(run)
    if not (len(history.settings.epoch) or len(history.val.epoch)):
        return written
    with matplotlib.rc_context(STYLE):
        for name, figure in _figures(history):
            path = run.plots / f"{name}.png"
            save(figure, path)
            written.append(path)
    return written


def _figures(history: History) -> Iterator[tuple[str, Figure]]:
    for name, (title, panel) in PANELS.items():
        figure = Figure(SINGLE, layout="constrained")
        figure.suptitle(f"{history.name}: {title}", fontweight="bold")
        panel(figure, history)
        yield name, figure
    yield "overview", _overview(history)


def _overview(history: History) -> Figure:
    figure = Figure(OVERVIEW, layout="constrained")
    figure.suptitle(_headline(history), fontsize=12, fontweight="bold")
    parts: Any = figure.subfigures(2, 3, hspace=0.04, wspace=0.02)
    for part, name in zip(parts.flat, DASHBOARD, strict=True):
        title, panel = PANELS[name]
        part.suptitle(title, fontsize=10)
        panel(part, history)
    return figure


def _headline(history: History) -> str:
    """Returns the run in a line: name, best accuracy, epochs, time and speed."""
    facts: list[str] = []
    best = history.best()
    if best is not None:
        facts.append(f"best val top-1 {history.val.top1[best]:.2f}%")
    last = history.settings if len(history.settings.epoch) else history.val
    minutes = max([*last.minutes[-1:], *history.val.minutes[-1:]])
    facts.append(f"{last.epoch[-1]:.4g} epochs in {_duration(minutes)}")
    if np.isfinite(history.images_per_second):
        facts.append(f"{history.images_per_second:,.0f} images/s")
    return f"{history.name}:  {'  ·  '.join(facts)}"


def _duration(minutes: float) -> str:
    """Returns a time as people say it."""
    if minutes < 2:
        return f"{60 * minutes:.0f} s"
    if minutes < 10:
        return f"{minutes:.1f} min"
    if minutes < 120:
        return f"{minutes:.0f} min"
    return f"{minutes // 60:.0f} h {minutes % 60:.0f} min"


def main() -> None:
    """Draws the run given on the command line."""
    draw(RunDirectory(Path(sys.argv[1])))


if __name__ == "__main__":
    main()
