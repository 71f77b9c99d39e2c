"""Explains a timeline: as a table for people, as JSON, and as CSV with a row an epoch."""

import csv
import io
import math
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import count, groupby, pairwise
from typing import TYPE_CHECKING, Any

from pitstop.core.recipe import RandAugment
from pitstop.core.schedule import Curve
from pitstop.core.timeline import Segment, StepSettings, Timeline

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
    "lr": lambda s: s.lr,
    "momentum": lambda s: s.momentum,
    "mixup_alpha": lambda s: s.mixup_alpha,
    "cutmix_alpha": lambda s: s.cutmix_alpha,
    "ema_decay": lambda s: s.ema_decay,
    "label_smoothing": lambda s: s.segment.phase.label_smoothing,
}


def as_csv(timeline: Timeline) -> str:
    """Returns a row an epoch: the settings of the first step that begins in it.

    Epochs count from 0, in units of passes over the phase's subset; floats have ten digits.
    """
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["epoch", *_COLUMNS])
    for epoch, step in _epoch_starts(timeline):
        settings = timeline.settings_at(step)
        values = [column(settings) for column in _COLUMNS.values()]
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
    alphas) is the list of its first, turning and last values; one value if it does not.
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
        "lr": _course(curves.lr, segment),
        "momentum": _course(curves.momentum, segment),
        "crop_scale": list(phase.crop.scale),
        "flip": phase.flip,
        "augment": phase.augment.name if phase.augment else None,
        "magnitude": _course(curves.magnitude, segment),
        **{f"jitter_{name}": _course(getattr(curves, name), segment) for name in _JITTER},
        "erasing_prob": _course(curves.erasing_prob, segment),
        "mixup_alpha": _course(curves.mixup_alpha, segment),
        "cutmix_alpha": _course(curves.cutmix_alpha, segment),
        "label_smoothing": phase.label_smoothing,
        "frozen": list(phase.freeze),
    }


def _course(curve: Curve, segment: Segment) -> list[float]:
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


# Notes


def notes(timeline: Timeline) -> list[str]:
    """Returns, a line each, what the table does not show and one would want to know."""
    segments = timeline.segments
    return [
        *(note for pair in pairwise(segments) for note in _dropped(*pair)),
        *_by_phase((s.phase.name, peak) for s in segments for peak in _peak(s)),
        *_average(timeline),
        _evaluation(timeline),
    ]


def _by_phase(facts: Iterable[tuple[str, str]]) -> list[str]:
    """Returns a line for each fact, with the names of the phases of which it is true."""
    names: dict[str, dict[str, None]] = {}
    for name, fact in facts:
        names.setdefault(fact, {})[name] = None
    return [f"{', '.join(phases)}: {fact}" for fact, phases in names.items()]


def _dropped(before: Segment, after: Segment) -> Iterator[str]:
    """What a change of data fraction leaves out."""
    into = before.walk_position(before.last) % before.num_samples
    if after.walk != before.walk and into:
        yield (
            f"{after.phase.name}: a new permutation of {after.num_samples:,} images begins, "
            f"{into / before.num_samples:.1%} into a pass of {before.phase.name}'s "
            f"{before.num_samples:,}, the rest of which is dropped"
        )


def _peak(segment: Segment) -> Iterator[str]:
    """How the peak learning rate comes about, where it is not the one stated."""
    phase = segment.phase
    terms, scaled = f"{phase.lr:g}", phase.lr
    if phase.lr_per is not None:
        terms += f" x batch {phase.batch_size:,} / {phase.lr_per:,}"
        scaled *= phase.batch_size / phase.lr_per
    if phase.lr_cap is not None and scaled > phase.lr_cap:
        terms = f"{phase.lr_cap:g}, the cap of {terms}"
    if phase.lr_scale != 1:
        terms += f", x scale {phase.lr_scale:g}"
    peak = phase.peak_lr()
    # An extension is a copy of the last phase whose curve has a peak of its own.
    aims_at_it = any(math.isclose(knot.value, peak) for knot in segment.curves.lr.knots)
    if terms != f"{phase.lr:g}" and aims_at_it:
        yield f"peak lr {peak:g} = {terms}"


def _average(timeline: Timeline) -> Iterator[str]:
    if timeline.recipe.ema is not None:
        decay = timeline.settings_at(timeline.last - 1).ema_decay
        yield f"weights are averaged (EMA), with a decay of {decay:.6g} at the end"


def _evaluation(timeline: Timeline) -> str:
    recipe, protocol = timeline.recipe, timeline.recipe.eval
    flips = ", averaged with the mirror image" if protocol.flip_average else ""
    return (
        f"{len(timeline.evaluations)} evaluations at {recipe.eval_resolution()} px, crop ratio "
        f"{protocol.crop_ratio:g}{flips}"
    )


# The table


def table(timeline: Timeline) -> "Group":
    """Returns what rich prints: the segments as a table, the phases' augmentation, the notes."""
    from rich import box
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    plan = as_json(timeline)
    rows = [_cells(segment) for segment in plan["segments"]]
    segments = Table(box=box.SIMPLE_HEAD)
    for key in rows[0]:
        words = key == "phase"
        segments.add_column(key, justify="left" if words else "right", no_wrap=not words)
    for row in rows:
        segments.add_row(*map(Text, row.values()))
    below = [*_by_phase(_regimes(timeline)), *plan["notes"]]
    return Group(
        Text(_headline(plan), style="bold"), segments, *(Text(f"- {line}") for line in below)
    )


def _headline(plan: dict[str, Any]) -> str:
    return (
        f"{plan['recipe']}: {plan['samples']:,} images, {plan['epochs']:.4g} epochs, "
        f"{plan['steps']:,} steps"
    )


def _cells(segment: dict[str, Any]) -> dict[str, str]:
    begin, end = segment["epochs"]
    accumulated = segment["grad_accum_steps"]
    return {
        "phase": segment["phase"],
        "epochs": f"{_short(begin)} - {_short(end)}",
        "steps": f"{segment['steps'][1] - segment['steps'][0]:,}",
        "px": str(segment["resolution"]),
        "batch": f"{segment['batch_size']:,}" + (f" in {accumulated}" if accumulated > 1 else ""),
        "data": f"{100 * segment['data_fraction']:.3g}%",
        "lr": _arrows(segment["lr"]),
    }


def _short(epoch: float) -> str:
    return f"{epoch:.2f}".rstrip("0").rstrip(".")


def _regimes(timeline: Timeline) -> Iterator[tuple[str, str]]:
    """Yields each phase's name, and how it augments and what it freezes."""
    for phase, group in groupby(timeline.segments, key=lambda segment: segment.phase):
        own = list(group)
        whole = replace(own[0], last=own[-1].last)
        parts = [f"crop {phase.crop.scale[0]:g}-{phase.crop.scale[1]:g}"]
        if phase.flip != "none":
            parts.append(f"flip {phase.flip}")
        parts += _varying(whole, {name: name for name in _JITTER})
        policy = phase.augment
        if isinstance(policy, RandAugment):
            magnitude = _arrows(_course(whole.curves.magnitude, whole))
            parts.append(f"{policy.num_ops} x {policy.name} of magnitude {magnitude}")
        elif policy is not None:
            parts.append(policy.name)
        parts += _varying(whole, {"erasing_prob": "erasing"})
        parts += _varying(whole, {"mixup_alpha": "mixup", "cutmix_alpha": "cutmix"})
        if phase.label_smoothing:
            parts.append(f"label smoothing {phase.label_smoothing:g}")
        if phase.freeze:
            parts.append(f"frozen: {' '.join(phase.freeze)}")
        yield phase.name, ", ".join(parts)


def _varying(segment: Segment, names: dict[str, str]) -> Iterator[str]:
    """Yields what a phase does to images, with its course, by the curve's name and a plain one."""
    for curve, name in names.items():
        course = _course(getattr(segment.curves, curve), segment)
        if any(course):
            yield f"{name} {_arrows(course)}"


def _arrows(course: list[float]) -> str:
    top = max(map(abs, course))
    texts = [f"{value:.3g}" if abs(value) > 1e-6 * top else "0" for value in course]
    return " → ".join(text for text, _ in groupby(texts))
