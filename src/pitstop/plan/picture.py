"""One picture of a plan, taken in at a glance: what happens when, in thin panels over the epochs.

Panels that have nothing to say (no mixing, nothing frozen, all of the data) are left out.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from pitstop.core.recipe import TrivialAugmentWide
from pitstop.core.timeline import Segment, StepSettings, Timeline
from pitstop.io.pictures import BLUE, GREEN, GREY, INK, ORANGE, PURPLE, RED, SKY, STYLE, save
from pitstop.plan.explain import arrows, whole_phases

SAMPLES = 2000
"""Steps at which the curves are computed: more than the picture has columns."""

WIDTHS = (9.0, 6.5)
"""Of a column, in inches: of one plan, of each of two."""
ROW, LOW, RIDGE = 1.15, 0.75, 0.33
"""Heights in inches: of a panel, of a low one, of a line in a panel of several."""
LETTER = 0.07
"""Width of a small letter, in inches."""
SAME_SCALE = 10
"""Two plans whose peak lr or length differ by more have scales of their own."""


@dataclass(frozen=True)
class Panel:
    """A thin diagram over the epochs: of one plan, on a scale that fits all of them."""

    label: str
    draw: Callable[[Axes, Timeline, list[Timeline]], None]
    height: float = ROW
    own_scale: bool = False


def draw(plans: list[Timeline], path: Path) -> None:
    """Draws a plan, or two side by side, into a PNG at `path`.

    Raises:
        OSError: `path` cannot be written.
    """
    panels = list(_panels(plans))
    heights = [panel.height for panel in panels]
    with matplotlib.rc_context(STYLE):
        width = WIDTHS[len(plans) - 1] * len(plans)
        figure = Figure((width, 1.1 + sum(heights)), layout="constrained")
        stacks = figure.subplots(
            len(panels), len(plans), sharex="col", squeeze=False, height_ratios=heights
        )
        for panel, row in zip(panels, stacks, strict=True):
            _draw_row(panel, list(row), plans)
        for plan, top, bottom in zip(plans, stacks[0], stacks[-1], strict=True):
            _name_phases(top, plan)
            title = _title(plan) if len(plans) == 1 else _title_of_column(plan)
            top.set_title(title, fontweight="bold", fontsize=10, pad=18)
            bottom.set_xlabel("epoch")
            bottom.set_xlim(0, _shown_epochs(plan, plans))
        figure.align_ylabels(stacks[:, 0])
        save(figure, path)


def _draw_row(panel: Panel, row: list[Axes], plans: list[Timeline]) -> None:
    """Draws a panel of each plan; what can be is on one scale."""
    for axes, plan in zip(row, plans, strict=True):
        panel.draw(axes, plan, plans)
        _shade(axes, plan)
    row[0].set_ylabel(panel.label)
    if not panel.own_scale:
        lows, highs = zip(*(axes.get_ylim() for axes in row), strict=True)
        inverted = lows[0] > highs[0]
        for axes in row:
            axes.set_ylim((max(lows), min(highs)) if inverted else (min(lows), max(highs)))


def _shown_epochs(plan: Timeline, plans: list[Timeline]) -> float:
    longest = max(p.epochs for p in plans)
    return longest if longest <= SAME_SCALE * min(p.epochs for p in plans) else plan.epochs


def _title(plan: Timeline) -> str:
    return (
        f"{plan.recipe.name}:  {plan.epochs:.4g} epochs of {plan.num_samples:,} images"
        f"  ·  {plan.last:,} steps  ·  {len(plan.evaluations)} evaluations"
    )


def _title_of_column(plan: Timeline) -> str:
    lr = "  ·  lr: fallback" if plan.lr_is_fallback else ""
    return (
        f"{plan.recipe.name}\n{plan.epochs:.4g} epochs of {plan.num_samples:,} images"
        f"  ·  {plan.last:,} steps{lr}"
    )


def _panels(plans: list[Timeline]) -> Iterator[Panel]:
    phases = [segment.phase for plan in plans for segment in plan.segments]
    peaks = [max(s.phase.peak_lr() for s in plan.segments) for plan in plans]
    fallback = "\n(fallback)" if all(plan.lr_is_fallback for plan in plans) else ""
    apart = max(peaks) > SAME_SCALE * min(peaks)
    yield Panel(f"learning\nrate{fallback}", _lr, own_scale=apart)
    yield Panel("momentum", _momentum, ROW if any(map(_momentum_varies, plans)) else LOW)
    yield Panel("resolution\n[px]", _resolution)
    yield Panel("batch\n[images]", _batch)
    if tricks := _tricks(plans):
        yield Panel("augmentation", _augmentation, max(ROW, 0.25 + RIDGE * len(tricks)))
    if any(phase.data_fraction < 1 for phase in phases):
        yield Panel("data\n[%]", _fraction)
    if modules := _modules(plans):
        yield Panel("frozen", _frozen, max(LOW, 0.25 + RIDGE * len(modules)))


# Panels


def _lr(axes: Axes, plan: Timeline, _: list[Timeline]) -> None:
    _curve(axes, plan, lambda s: s.lr, GREEN)


def _momentum(axes: Axes, plan: Timeline, _: list[Timeline]) -> None:
    _curve(axes, plan, lambda s: s.momentum, PURPLE)
    axes.yaxis.set_major_locator(MaxNLocator(3))
    if not _momentum_varies(plan):
        value = plan.settings_at(0).momentum
        axes.set_ylim(value - 0.05, min(1.0, value + 0.1))
        _write(axes, f"{value:g}", plan.epochs / 2, value)


def _momentum_varies(plan: Timeline) -> bool:
    return len({segment.curves.momentum for segment in plan.segments}) > 1 or any(
        len({knot.value for knot in segment.curves.momentum.knots}) > 1 for segment in plan.segments
    )


def _resolution(axes: Axes, plan: Timeline, _: list[Timeline]) -> None:
    _levels(axes, plan, lambda s: s.resolution, SKY)


def _batch(axes: Axes, plan: Timeline, _: list[Timeline]) -> None:
    _levels(axes, plan, lambda s: s.batch_size, INK)


def _fraction(axes: Axes, plan: Timeline, _: list[Timeline]) -> None:
    _levels(axes, plan, lambda s: 100 * s.phase.data_fraction, BLUE)


Strength = Callable[[StepSettings], float]

_STRENGTHS: dict[str, tuple[Strength, str]] = {
    "translate [px]": (lambda s: s.segment.phase.translate, SKY),
    "color jitter": (lambda s: max(s.brightness, s.contrast, s.saturation, s.hue), PURPLE),
    "RandAugment": (lambda s: s.magnitude, GREEN),
    "TrivialAugment": (
        lambda s: float(isinstance(s.segment.phase.augment, TrivialAugmentWide)),
        GREEN,
    ),
    "erasing": (lambda s: s.erasing_prob, INK),
    "repeats": (lambda s: _more_than_one(s.segment.phase.repeated_augmentation), GREY),
    "mixup": (lambda s: s.mixup_alpha, BLUE),
    "CutMix": (lambda s: s.cutmix_alpha, ORANGE),
    "smoothing": (lambda s: s.segment.phase.label_smoothing, RED),
}
"""What is done to images and labels: how strongly at a step, 0 where it is not done; its colour."""


def _more_than_one(times: int) -> int:
    return times if times > 1 else 0


def _tricks(plans: list[Timeline]) -> dict[str, float]:
    """Returns what any of the plans does to images, and how strongly at most."""
    settings = [plan.settings_at(step) for plan in plans for step in _steps(plan)]
    tops = {name: max(map(strength, settings)) for name, (strength, _) in _STRENGTHS.items()}
    return {name: top for name, top in tops.items() if top > 0}


def _augmentation(axes: Axes, plan: Timeline, plans: list[Timeline]) -> None:
    """Draws a ridge for each trick, as high as it is strong, with its values written on it."""
    tricks = _tricks(plans)
    settings = [plan.settings_at(step) for step in _steps(plan)]
    epochs = [*(s.epoch for s in settings), plan.epochs]
    for row, (name, top) in enumerate(tricks.items()):
        strength, colour = _STRENGTHS[name]
        values = [strength(s) / top for s in (*settings, settings[-1])]
        if not any(values):
            continue
        ground = row + 0.9
        heights = [ground - 0.75 * value for value in values]
        axes.fill_between(epochs, ground, heights, color=colour, alpha=0.2, linewidth=0)
        axes.plot(epochs, heights, color=colour, linewidth=1.4)
        for text, mean, begin, end in _values(plan, strength):
            if _fits(axes, text, (end - begin) / _shown_epochs(plan, plans)):
                height = 0.75 * mean / top
                middle = height / 2 if height > 0.4 else height + 0.2  # in the ridge, or above it
                place = {"ha": "center", "va": "center", "fontsize": 8, "color": INK}
                axes.text((begin + end) / 2, ground - middle, text, **place)
    _rows(axes, [(row + 0.55, name) for row, name in enumerate(tricks)])


def _values(plan: Timeline, strength: Strength) -> Iterator[tuple[str, float, float, float]]:
    """Yields a trick's value, or its first and last; their mean; and the epochs that have them."""
    told: list[tuple[str, float, float, float]] = []
    for whole in whole_phases(plan):
        ends = [strength(plan.settings_at(step)) for step in (whole.first, whole.last - 1)]
        mean = (ends[0] + ends[1]) / 2
        told.append((arrows(ends), mean, whole.epoch(whole.first), whole.epoch(whole.last)))
    for text, group in groupby(told, key=lambda phase: phase[0]):
        same = list(group)
        if text != "0":
            yield text, same[0][1], same[0][2], same[-1][3]


def _modules(plans: list[Timeline]) -> list[str]:
    return list(dict.fromkeys(m for plan in plans for s in plan.segments for m in s.phase.freeze))


def _frozen(axes: Axes, plan: Timeline, plans: list[Timeline]) -> None:
    """Draws a bar for each module while it stands still."""
    modules = _modules(plans)
    for row, module in enumerate(modules):
        still = [
            (s.epoch(s.first), s.epoch(s.last) - s.epoch(s.first))
            for s in plan.segments
            if module in s.phase.freeze
        ]
        axes.broken_barh(still, (row + 0.2, 0.6), color=SKY)
    _rows(axes, [(row + 0.5, module) for row, module in enumerate(modules)])


def _rows(axes: Axes, rows: list[tuple[float, str]]) -> None:
    """Lays out a panel of several lines, from top to bottom, with their names."""
    axes.set_yticks([place for place, _ in rows], [name for _, name in rows])
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(len(rows) + 0.1, -0.1)
    axes.grid(visible=False, axis="y")


def _curve(axes: Axes, timeline: Timeline, value: Strength, colour: str) -> None:
    settings = [timeline.settings_at(step) for step in _steps(timeline)]
    epochs = [*(s.epoch for s in settings), timeline.epochs]
    values = [*map(value, settings), value(settings[-1])]
    axes.plot(epochs, values, color=colour, linewidth=1.8)


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
        if _fits(axes, text, (end - begin) / timeline.epochs):
            _write(axes, text, (begin + end) / 2, level)


def _write(axes: Axes, text: str, epoch: float, level: float) -> None:
    """Writes a small text just above a line."""
    above = {"xytext": (0, 2), "textcoords": "offset points"}
    axes.annotate(text, (epoch, level), ha="center", fontsize=8, color=INK, **above)


def _fits(axes: Axes, text: str, share: float) -> bool:
    """Tells whether a small text goes into this share of the panel's width."""
    return _letters(axes, share) >= len(text) + 1


def _letters(axes: Axes, share: float) -> float:
    columns = axes.figure.get_axes()[-1].get_subplotspec()
    assert columns is not None
    count = columns.get_gridspec().ncols
    return share * WIDTHS[count - 1] * 0.85 / LETTER


# Phases


def _phases(timeline: Timeline) -> Iterator[tuple[str, float, float]]:
    """Yields the name, the first and the last epoch of each phase."""
    for whole in whole_phases(timeline):
        yield whole.phase.name, whole.epoch(whole.first), whole.epoch(whole.last)


def _shade(axes: Axes, timeline: Timeline) -> None:
    for _, begin, end in list(_phases(timeline))[1::2]:
        axes.axvspan(begin, end, color="#000000", alpha=0.05, linewidth=0, zorder=0)


def _name_phases(axes: Axes, timeline: Timeline) -> None:
    for name, begin, end in _phases(timeline):
        room = int(_letters(axes, (end - begin) / timeline.epochs))
        if room >= min(len(name), 7):
            text = name if len(name) <= room else name[: room - 1] + "…"
            place = {"xycoords": axes.get_xaxis_transform(), "textcoords": "offset points"}
            small = {"ha": "center", "fontsize": 8, "color": GREY}
            axes.annotate(text, ((begin + end) / 2, 1.0), xytext=(0, 3), **place, **small)
