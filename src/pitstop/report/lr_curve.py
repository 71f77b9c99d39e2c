"""The picture of a search for the learning rate: losses over lr, and what was made of them."""

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pitstop.io.pictures import BLUE, GREEN, INK, RED, SINGLE, STYLE, save
from pitstop.io.records import Event, read_events
from pitstop.io.run_directory import RunDirectory


def draw_new(run: RunDirectory) -> list[Path]:
    """Draws the search that a run began with, if it is not drawn yet; returns what it wrote."""
    found = [event for event in read_events(run.events) if event["kind"] == "lr_find"]
    if not found or run.lr_picture.exists():
        return []
    draw(found[0], run.lr_picture)
    return [run.lr_picture]


def draw(search: Event, path: Path) -> None:
    """Draws a search.

    Args:
        search: with `lrs`, `losses` and `smoothed` (None where not finite), `at` and `suggestion`
            (None without one), `policy`, `peak`, `explained`.
        path: of the PNG.

    Raises:
        OSError: it cannot be written.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(SINGLE, layout="constrained")
        _curve(figure.subplots(), search)
        figure.suptitle(search["explained"], fontsize=9, wrap=True)
        save(figure, path)


def _curve(axes: Axes, search: Event) -> None:
    lrs = np.array(search["lrs"])
    raw, smooth = (np.array(search[key], dtype=float) for key in ("losses", "smoothed"))
    axes.plot(lrs, raw, ".", color=RED, alpha=0.35, markersize=4, label="loss")
    axes.plot(lrs, smooth, color=RED, linewidth=1.8, label="smoothed")
    if (at := search["at"]) is not None:
        ring: dict[str, Any] = {"markersize": 8, "markerfacecolor": "white", "markeredgewidth": 1.5}
        label = f"{search['policy']}: lr {lrs[at]:.3g}"
        axes.plot(lrs[at], smooth[at], "o", color=BLUE, label=label, **ring)
        if search["suggestion"] != lrs[at]:
            label = f"found: {search['suggestion']:.3g}"
            axes.axvline(search["suggestion"], color=BLUE, linewidth=1.2, label=label)
    label = f"peak: {search['peak']:.3g}"
    axes.axvline(search["peak"], color=GREEN, linewidth=1.8, linestyle="--", label=label)
    axes.set_xscale("log")
    axes.set_xlabel("learning rate", color=INK)
    axes.set_ylabel("training loss [nats]")
    if len(finite := smooth[np.isfinite(smooth)]):
        span = max(finite[0] - finite.min(), 0.05 * abs(finite[0]), 1e-6)
        axes.set_ylim(
            finite.min() - 0.3 * span, finite[0] + span
        )  # what explodes leaves at the top
    axes.legend(loc="best")
