"""One picture of a plan, taken in at a glance: what happens when, in thin panels over the epochs.

Panels that have nothing to say (no mixing, nothing frozen, all of the data) are left out.
"""

from collections.abc import Callable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from pitstop.core.timeline import Segment, StepSettings, Timeline
from pitstop.io.storage import atomic_write

SAMPLES = 2000
"""Steps at which the curves are computed: more than the picture has columns."""

# Okabe and Ito's colours, safe for the colour-blind.
BLUE, ORANGE, RED, GREEN = "#0072B2", "#E69F00", "#D55E00", "#009E73"
PURPLE, SKY, INK, GREY = "#AA4499", "#56B4E9", "#222222", "#777777"
STYLE: dict[Any, Any] = {
    "font.size": 9.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "axes.labelcolor": INK,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#DDDDDD",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
}
Panel = Callable[[Axes, Timeline], None]


def draw(timeline: Timeline, path: Path) -> None:
    """Draws the plan into a PNG at `path`.

    Raises:
        OSError: `path` cannot be written.
    """
    panels = list(_panels(timeline))
    with matplotlib.rc_context(STYLE):
        figure = Figure((9.0, 1.1 + 1.15 * len(panels)), layout="constrained")
        figure.suptitle(_title(timeline), fontweight="bold")
        stack: list[Axes] = list(figure.subplots(len(panels), 1, sharex=True, squeeze=False).flat)
        for axes, panel in zip(stack, panels, strict=True):
            panel(axes, timeline)
            _shade(axes, timeline)
        _name_phases(stack[0], timeline)
        stack[-1].set_xlabel("epoch")
        stack[-1].set_xlim(0, timeline.epochs)
        figure.align_ylabels()
        with atomic_write(path) as file:
            figure.savefig(file, format="png", dpi=150)


def _title(timeline: Timeline) -> str:
    return (
        f"{timeline.recipe.name}:  {timeline.epochs:.4g} epochs of {timeline.num_samples:,} images"
        f"  ·  {timeline.last:,} steps  ·  {len(timeline.evaluations)} evaluations"
    )


def _panels(timeline: Timeline) -> Iterator[Panel]:
    phases = [segment.phase for segment in timeline.segments]
    yield _lr
    yield _momentum
    yield _resolution
    yield _batch
    if any(phase.mix or phase.label_smoothing for phase in phases):
        yield _mixing
    if any(phase.data_fraction < 1 for phase in phases):
        yield _fraction
    if any(phase.freeze for phase in phases):
        yield _frozen


# Panels


def _lr(axes: Axes, timeline: Timeline) -> None:
    _curve(axes, timeline, lambda s: s.lr, GREEN)
    axes.set_ylabel("learning\nrate")


def _momentum(axes: Axes, timeline: Timeline) -> None:
    _curve(axes, timeline, lambda s: s.momentum, PURPLE)
    axes.set_ylabel("momentum")


def _resolution(axes: Axes, timeline: Timeline) -> None:
    _levels(axes, timeline, lambda s: s.resolution, SKY)
    axes.set_ylabel("resolution\n[px]")


def _batch(axes: Axes, timeline: Timeline) -> None:
    _levels(axes, timeline, lambda s: s.batch_size, INK)
    axes.set_ylabel("batch\n[images]")


def _mixing(axes: Axes, timeline: Timeline) -> None:
    _curve(axes, timeline, lambda s: s.mixup_alpha, BLUE, "mixup alpha")
    _curve(axes, timeline, lambda s: s.cutmix_alpha, ORANGE, "cutmix alpha")
    _curve(axes, timeline, lambda s: s.segment.phase.label_smoothing, RED, "label smoothing")
    axes.set_ylim(0, 1.5 * axes.get_ylim()[1])  # the legend lies above the curves
    axes.set_ylabel("mixing,\nsmoothing")
    axes.legend(loc="upper left", ncols=3)


def _fraction(axes: Axes, timeline: Timeline) -> None:
    _levels(axes, timeline, lambda s: 100 * s.phase.data_fraction, BLUE)
    axes.set_ylabel("data\n[%]")


def _frozen(axes: Axes, timeline: Timeline) -> None:
    """Draws a bar for each module while it stands still."""
    modules = list(dict.fromkeys(m for s in timeline.segments for m in s.phase.freeze))
    for row, module in enumerate(modules):
        still = [
            (s.epoch(s.first), s.epoch(s.last) - s.epoch(s.first))
            for s in timeline.segments
            if module in s.phase.freeze
        ]
        axes.broken_barh(still, (row - 0.35, 0.7), color=SKY)
    axes.set_yticks(range(len(modules)), modules)
    axes.set_ylim(len(modules) - 0.4, -0.6)
    axes.grid(visible=False, axis="y")
    axes.set_ylabel("frozen")


def _curve(
    axes: Axes,
    timeline: Timeline,
    value: Callable[[StepSettings], float],
    colour: str,
    label: str | None = None,
) -> None:
    settings = [timeline.settings_at(step) for step in _steps(timeline)]
    epochs = [*(s.epoch for s in settings), timeline.epochs]
    values = [*map(value, settings), value(settings[-1])]
    axes.plot(epochs, values, color=colour, linewidth=1.8, label=label)


def _steps(timeline: Timeline) -> list[int]:
    """Returns about SAMPLES steps, with both sides of each change of segment."""
    even = np.linspace(0, timeline.last - 1, min(SAMPLES, timeline.last)).astype(int).tolist()
    ends = [step for s in timeline.segments for step in (s.first, s.last - 1)]
    return sorted({*even, *ends})


def _levels(axes: Axes, timeline: Timeline, value: Callable[[Segment], float], colour: str) -> None:
    """Draws what is constant in each segment, with its values written on it."""
    runs = [(level, list(group)) for level, group in groupby(timeline.segments, key=value)]
    spans = [(v, run[0].epoch(run[0].first), run[-1].epoch(run[-1].last)) for v, run in runs]
    levels = [level for level, _, _ in spans]
    edges = [*(begin for _, begin, _ in spans), timeline.epochs]
    axes.stairs(levels, edges, baseline=0, fill=True, color=colour, alpha=0.15)
    axes.stairs(levels, edges, baseline=None, color=colour, linewidth=1.8)
    axes.set_ylim(0, 1.35 * max(levels))
    axes.yaxis.set_major_locator(MaxNLocator(3, integer=True))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda level, _: f"{level:,.0f}"))
    for level, begin, end in spans:
        text = f"{level:,.0f}"
        if (end - begin) / timeline.epochs > 0.015 * len(text):
            middle = ((begin + end) / 2, level)
            offset = {"xytext": (0, 2), "textcoords": "offset points"}
            axes.annotate(text, middle, ha="center", fontsize=8, color=INK, **offset)


# Phases


def _phases(timeline: Timeline) -> Iterator[tuple[str, float, float]]:
    """Yields the name, the first and the last epoch of each phase."""
    for _, group in groupby(timeline.segments, key=lambda segment: segment.phase):
        same = list(group)
        yield same[0].phase.name, same[0].epoch(same[0].first), same[-1].epoch(same[-1].last)


def _shade(axes: Axes, timeline: Timeline) -> None:
    for _, begin, end in list(_phases(timeline))[1::2]:
        axes.axvspan(begin, end, color="#000000", alpha=0.05, linewidth=0, zorder=0)


def _name_phases(axes: Axes, timeline: Timeline) -> None:
    for name, begin, end in _phases(timeline):
        room = int((end - begin) / timeline.epochs * 100)
        if room >= min(len(name), 7):
            text = name if len(name) <= room else name[: room - 1] + "…"
            place = {"xycoords": axes.get_xaxis_transform(), "textcoords": "offset points"}
            small = {"ha": "center", "fontsize": 8, "color": GREY}
            axes.annotate(text, ((begin + end) / 2, 1.0), xytext=(0, 3), **place, **small)
