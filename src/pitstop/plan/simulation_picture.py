"""The picture of a simulation: when the runs end, by how often the machine goes."""

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from pitstop.io.pictures import BLUE, GREEN, INK, ORANGE, RED, SINGLE, SKY, STYLE, save
from pitstop.plan.simulate import Simulation

COLUMNS = 1000
"""Moments at which the picture looks: more than it has pixels for."""

COLOURS = (GREEN, SKY, ORANGE, RED)
"""Of runs with none, one, two, and more interruptions."""


def draw(simulation: Simulation, title: str, path: Path) -> None:
    """Draws the times of all runs into a PNG at `path`; the upper axis has what they cost.

    Raises:
        OSError: `path` cannot be written.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(SINGLE, layout="constrained")
        axes = figure.subplots()
        _times(axes, simulation)
        _marks(axes, simulation)
        if hourly := simulation.course.dollars_per_hour:
            _dollars(axes, hourly)
        axes.legend(loc="lower right", frameon=True)
        figure.suptitle(title, fontsize=10, fontweight="bold", wrap=True)
        save(figure, path)


def _times(axes: Axes, simulation: Simulation) -> None:
    """Draws the share of runs that have ended, stacked by the number of interruptions."""
    minutes = simulation.minutes
    room = max(float(np.ptp(minutes)), 0.02 * float(minutes.max()))
    clock = np.linspace(minutes.min() - 0.05 * room, minutes.min() + 1.02 * room, COLUMNS)
    ground = np.zeros(COLUMNS)
    for label, colour, which in _groups(simulation.interruptions):
        ended = np.searchsorted(np.sort(minutes[which]), clock, side="right")
        top = ground + 100 * ended / len(minutes)
        share = f"{which.mean():.0%}"
        axes.fill_between(
            clock, ground, top, color=colour, alpha=0.7, linewidth=0,
            label=f"{label}: {share} of the runs",
        )  # fmt: skip
        ground = top
    axes.set_xlim(clock[0], clock[-1])
    axes.set_ylim(0, 100)
    axes.set_xlabel("minutes")
    axes.set_ylabel(f"runs that have ended [%, of {len(minutes):,}]")


def _groups(interruptions: NDArray[np.int64]) -> list[tuple[str, str, NDArray[np.bool_]]]:
    """Returns name, colour and members of the groups that have any."""
    most = len(COLOURS) - 1
    names = ["no interruption", "1 interruption", "2 interruptions", f"{most} or more"]
    capped = np.minimum(interruptions, most)
    groups = [(name, COLOURS[n], capped == n) for n, name in enumerate(names)]
    return [group for group in groups if group[2].any()]


def _marks(axes: Axes, simulation: Simulation) -> None:
    minutes = simulation.minutes
    line: dict[str, Any] = {"linewidth": 1.6}
    for label, at, colour, style in (
        ("undisturbed", simulation.course.undisturbed / 60, INK, ":"),
        ("mean", float(minutes.mean()), BLUE, "-"),
        ("95% end by", float(np.percentile(minutes, 95)), BLUE, "--"),
    ):
        axes.axvline(at, color=colour, linestyle=style, label=f"{label}: {at:,.1f} min", **line)


def _dollars(axes: Axes, hourly: float) -> None:
    def dollars(minutes: Any) -> Any:
        return minutes / 60 * hourly

    def minutes(dollars: Any) -> Any:
        return dollars * 60 / hourly

    upper = axes.secondary_xaxis("top", functions=(dollars, minutes))
    upper.set_xlabel(f"dollars, at ${hourly:,.2f} an hour")
