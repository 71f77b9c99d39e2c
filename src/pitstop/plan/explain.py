"""Explains a timeline: as a table for people, as JSON, and as CSV with a row an epoch."""

import csv
import io
import math
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import count, groupby
from typing import TYPE_CHECKING, Any

from pitstop.core.recipe import RandAugment
from pitstop.core.schedule import Curve
from pitstop.core.timeline import Segment, StepSettings, Timeline
from pitstop.plan.notes import by_phase, notes

if TYPE_CHECKING:  # rich is imported by who prints
    from rich.console import Group

NUMBER = ".10g"
"""Digits of a CSV: short of the last ones, in which two machines' cosines may differ."""

_COLUMNS: dict[str, Callable[[StepSettings], Any]] = {
    "step": lambda s: s.step,
    "phase": lambda s: s.segment.phase.name,
    "resolution": lambda s: s.segment.resolution,
    "batch_size": lambda s: s.segment.batch_size,
    "data_fraction": lambda s: s.segment.phase.data_fraction,
    "repeated_augmentation": lambda s: s.segment.phase.repeated_augmentation,
    "lr": lambda s: s.lr,
    "momentum": lambda s: s.momentum,
    "optimizer_state": lambda s: s.segment.phase.optimizer_state,
    "crop_scale": lambda s: _words(map(str, s.segment.phase.crop.scale)),
    "flip": lambda s: s.segment.phase.flip,
    "translate": lambda s: s.segment.phase.translate,
    "brightness": lambda s: s.brightness,
    "contrast": lambda s: s.contrast,
    "saturation": lambda s: s.saturation,
    "hue": lambda s: s.hue,
    "augment": lambda s: s.segment.phase.augment.name if s.segment.phase.augment else "none",
    "magnitude": lambda s: s.magnitude,
    "erasing_prob": lambda s: s.erasing_prob,
    "mixup_alpha": lambda s: s.mixup_alpha,
    "cutmix_alpha": lambda s: s.cutmix_alpha,
    "mix_prob": lambda s: s.segment.phase.mix.prob if s.segment.phase.mix else 0.0,
    "ema_decay": lambda s: s.ema_decay,
    "label_smoothing": lambda s: s.segment.phase.label_smoothing,
    "frozen": lambda s: _words(s.segment.phase.freeze) or "none",
}


def _words(parts: Iterable[str]) -> str:
    return " ".join(parts)


def as_csv(timeline: Timeline) -> str:
    """Returns a row an epoch: the settings of the first step that begins in it.

    Epochs count from 0, in units of passes over the phase's subset; floats have ten digits.
    `lr_from` is `recipe`, or `fallback` where the run's finder decides.
    """
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["epoch", *_COLUMNS, "lr_from"])
    lr_from = "fallback" if timeline.lr_is_fallback else "recipe"
    for epoch, step in _epoch_starts(timeline):
        settings = timeline.settings_at(step)
        values = [*(column(settings) for column in _COLUMNS.values()), lr_from]
        writer.writerow(
            [epoch, *(format(v, NUMBER) if isinstance(v, float) else v for v in values)]
        )
    return out.getvalue()


def _epoch_starts(timeline: Timeline) -> Iterator[tuple[int, int]]:
    """Yields each epoch with its first step."""
    for epoch in count():
        step = bisect_left(
            range(timeline.last),
            epoch - 1e-9,  # a walk's start is a sum of floats
            key=lambda step: timeline.segment_at(step).epoch(step),
        )
        if step == timeline.last:
            return
        yield epoch, step


def as_json(timeline: Timeline) -> dict[str, Any]:
    """Returns the plan as plain data.

    `epochs` and `steps` are [from, to). What may vary within a segment (`lr`, `momentum`, the
    alphas) is the list of its first, turning and last values; one value if it does not. With
    `lr_fallback`, the recipe says `lr: auto`, and the finder of the run decides.
    """
    recipe = timeline.recipe
    return {
        "recipe": recipe.name,
        "samples": timeline.num_samples,
        "steps": timeline.last,
        "epochs": round(timeline.epochs, 6),
        "images": sum(s.steps * s.batch_size for s in timeline.segments),
        "evaluations": len(timeline.evaluations),
        "eval_resolution": recipe.eval_resolution(),
        "lr_fallback": timeline.lr_is_fallback,
        "segments": [_segment(segment) for segment in timeline.segments],
        "notes": notes(timeline),
    }


_JITTER = ("brightness", "contrast", "saturation", "hue")


def _segment(segment: Segment) -> dict[str, Any]:
    phase, curves = segment.phase, segment.curves
    return {
        "phase": phase.name,
        "epochs": [round(segment.epoch(step), 6) for step in (segment.first, segment.last)],
        "steps": [segment.first, segment.last],
        "images": segment.steps * segment.batch_size,
        "resolution": segment.resolution,
        "batch_size": segment.batch_size,
        "grad_accum_steps": phase.grad_accum_steps,
        "data_fraction": phase.data_fraction,
        "repeated_augmentation": phase.repeated_augmentation,
        "lr": course_of(curves.lr, segment),
        "momentum": course_of(curves.momentum, segment),
        "crop_scale": list(phase.crop.scale),
        "flip": phase.flip,
        "translate": phase.translate,
        "augment": phase.augment.name if phase.augment else None,
        "magnitude": course_of(curves.magnitude, segment),
        **{f"jitter_{name}": course_of(getattr(curves, name), segment) for name in _JITTER},
        "erasing_prob": course_of(curves.erasing_prob, segment),
        "mixup_alpha": course_of(curves.mixup_alpha, segment),
        "cutmix_alpha": course_of(curves.cutmix_alpha, segment),
        "label_smoothing": phase.label_smoothing,
        "frozen": list(phase.freeze),
    }


def course_of(curve: Curve, segment: Segment) -> list[float]:
    """Returns the first value, the turning points in between if any, and the last; one if equal.

    Between two knots a curve only rises or only falls, so the knots tell all.
    """
    ends = (segment.first, segment.last - 1)
    inner = {f(knot.at) for knot in curve.knots for f in (math.floor, math.ceil)}
    steps = sorted({*ends, *(step for step in inner if ends[0] < step < ends[1])})
    course = [curve(steps[0])]
    for value in map(curve, steps[1:]):
        rises = value > course[-1]
        if len(course) > 1 and value != course[-1] and rises == (course[-1] > course[-2]):
            course[-1] = value
        elif value != course[-1]:
            course.append(value)
    return course


# The table


def table(timeline: Timeline) -> "Group":
    """Returns what rich prints: the segments as a table, the phases' augmentation, the notes."""
    from rich import box
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    plan = as_json(timeline)
    rows = [_cells(segment, plan["lr_fallback"]) for segment in plan["segments"]]
    segments = Table(box=box.SIMPLE_HEAD)
    for key in rows[0]:
        words = key == "phase"
        segments.add_column(key, justify="left" if words else "right", no_wrap=not words)
    for row in rows:
        segments.add_row(*map(Text, row.values()))
    below = [*by_phase(_regimes(timeline)), *plan["notes"]]
    return Group(
        Text(_headline(plan), style="bold"), segments, *(Text(f"- {line}") for line in below)
    )


def _headline(plan: dict[str, Any]) -> str:
    return (
        f"{plan['recipe']}: {plan['samples']:,} images, {plan['epochs']:.4g} epochs, "
        f"{plan['steps']:,} steps"
    )


def _cells(segment: dict[str, Any], lr_is_fallback: bool) -> dict[str, str]:
    begin, end = segment["epochs"]
    accumulated = segment["grad_accum_steps"]
    return {
        "phase": segment["phase"],
        "epochs": f"{_short(begin)} - {_short(end)}",
        "steps": f"{segment['steps'][1] - segment['steps'][0]:,}",
        "px": str(segment["resolution"]),
        "batch": f"{segment['batch_size']:,}" + (f" in {accumulated}" if accumulated > 1 else ""),
        "data": f"{100 * segment['data_fraction']:.3g}%",
        "lr (fallback)" if lr_is_fallback else "lr": arrows(segment["lr"]),
    }


def _short(epoch: float) -> str:
    return f"{epoch:.2f}".rstrip("0").rstrip(".")


def _regimes(timeline: Timeline) -> Iterator[tuple[str, str]]:
    """Yields each phase's name, and how it augments and what it freezes."""
    for whole in whole_phases(timeline):
        phase = whole.phase
        parts = [*augmentation(whole), *mixing(whole)]
        if phase.label_smoothing:
            parts.append(f"label smoothing {phase.label_smoothing:g}")
        if phase.freeze:
            parts.append(f"frozen: {' '.join(phase.freeze)}")
        yield phase.name, ", ".join(parts)


def augmentation(whole: Segment) -> Iterator[str]:
    """Yields what a phase does to each image, with its course."""
    phase = whole.phase
    yield f"crop {phase.crop.scale[0]:g}-{phase.crop.scale[1]:g}"
    if phase.flip != "none":
        yield f"flip {phase.flip}"
    if phase.translate:
        yield f"translate {phase.translate} px"
    yield from _varying(whole, {name: name for name in _JITTER})
    policy = phase.augment
    if isinstance(policy, RandAugment):
        magnitude = arrows(course_of(whole.curves.magnitude, whole))
        yield f"{policy.num_ops} x {policy.name} of magnitude {magnitude}"
    elif policy is not None:
        yield policy.name
    yield from _varying(whole, {"erasing_prob": "erasing"})


def mixing(whole: Segment) -> Iterator[str]:
    """Yields how a phase mixes images, with its course."""
    yield from _varying(whole, {"mixup_alpha": "mixup", "cutmix_alpha": "cutmix"})


def whole_phases(timeline: Timeline) -> Iterator[Segment]:
    """Yields each phase as one segment, of its first size."""
    for _, group in groupby(timeline.segments, key=lambda segment: segment.phase):
        own = list(group)
        yield replace(own[0], last=own[-1].last)


def _varying(segment: Segment, names: dict[str, str]) -> Iterator[str]:
    """Yields the curves of these names that are not 0 throughout, by the plain names given."""
    for curve, name in names.items():
        course = course_of(getattr(segment.curves, curve), segment)
        if any(course):
            yield f"{name} {arrows(course)}"


def arrows(course: list[float]) -> str:
    """Returns a course in a few characters: `0.2 → 0.4 → 0`."""
    top = max(map(abs, course))
    texts = [_in_short(value) if abs(value) > 1e-6 * top else "0" for value in course]
    return " → ".join(text for text, _ in groupby(texts))


def _in_short(value: float) -> str:
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
