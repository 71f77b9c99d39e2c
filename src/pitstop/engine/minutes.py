"""`train --minutes`: as many epochs as fit, by the speed of this machine.

It is measured once, before the first step, on the run's own images and with its own loader. What
comes of it is an amendment: when the run goes on later, there or elsewhere, nothing is measured.
"""

import json
from dataclasses import dataclass
from itertools import cycle

from rich.console import Console

from pitstop.core.recipe import Eval, Recipe
from pitstop.core.timeline import Amendment, Fit, Segment, Timeline
from pitstop.data.load import EvalLoader, Loader
from pitstop.data.packed import PackedDataset
from pitstop.engine.calibrate import (
    SECONDS,
    image_seconds,
    kind,
    kinds,
    made_ready,
    quick,
    quick_evaluation,
    save_seconds,
    step_seconds,
)
from pitstop.engine.evaluate import protocols, side
from pitstop.engine.lr_finder import untouched
from pitstop.engine.resume import Course, Wish
from pitstop.engine.state import TrainState
from pitstop.plan.budget import epochs_within
from pitstop.runtime.devices import Device
from pitstop.runtime.ranks import Ranks

PREFETCH = 1
"""Batches that are decoded ahead while steps are measured: soon it shows which of both waits."""


@dataclass(frozen=True)
class Pace:
    """Seconds that a segment takes: once, and an image of the global batch."""

    once: float
    image: float


@dataclass(frozen=True)
class Paces:
    """What the parts of a run take on this machine, in seconds."""

    steps: dict[str, Pace]
    """By the kind of work."""
    evaluation: float
    also: float
    """The evaluations by `eval.also`, at the end."""
    save: float

    def minutes(self, timeline: Timeline) -> float:
        """Returns what a run takes from its first step to its end; a save follows an evaluation."""
        trained = sum(self._of(segment) for segment in timeline.segments)
        evaluated = len(timeline.evaluations) * (self.evaluation + self.save) + self.also
        return (trained + evaluated) / 60

    def _of(self, segment: Segment) -> float:
        pace = self.steps[kind(segment)]
        return pace.once + pace.image * segment.steps * segment.batch_size


def fitted(
    wish: Wish,
    course: Course,
    state: TrainState,
    data: PackedDataset,
    device: Device,
    ranks: Ranks,
    console: Console,
    *,
    workers: int,
) -> Course:
    """Returns the course of a new run with as many epochs as fit the time that is asked for.

    All ranks call this; rank 0's clock counts. The state is afterwards what it was, to the bit.
    What comes before the first step (the start, a search for the lr) is not in the time.

    Raises:
        InputError: not even one epoch fits, or the recipe's durations are absolute.
    """
    limit = wish.limit
    assert limit is not None
    if ranks.main:
        console.print(f"--minutes {limit.minutes:g}: measuring how fast this machine is")
    paces = measured(
        course.recipe, state, data, device, ranks, workers=workers, fit_memory=wish.fit_memory
    )
    said = None
    if ranks.main:
        epochs = epochs_within(
            limit.minutes,
            lambda epochs: paces.minutes(
                Timeline.planned(limit.recipe_of(epochs), course.num_samples)
            ),
            unit="minutes",
        )
        said = json.dumps(epochs).encode()
    epochs = json.loads(ranks.from_main(said))
    recipe = limit.recipe_of(epochs).model_copy(update={"data": course.recipe.data})
    amendment = Amendment(step=0, change=Fit(minutes=limit.minutes, recipe=recipe))
    return course.amended(amendment, _explained(epochs, course, limit.minutes, paces))


def _explained(epochs: float, course: Course, minutes: float, paces: Paces) -> str:
    sides = [
        f"{1 / paces.steps[kind(segment)].image:,.0f} images/s at {segment.resolution} px"
        for segment in kinds(course.timeline)
    ]
    return (
        f"--minutes {minutes:g}: {epochs:g} epochs instead of {course.recipe.epochs:g}, as "
        f"{', '.join(sides)} and {paces.evaluation:.2g} s an evaluation were measured"
    )


def measured(
    recipe: Recipe,
    state: TrainState,
    data: PackedDataset,
    device: Device,
    ranks: Ranks,
    *,
    workers: int,
    fit_memory: bool,
) -> Paces:
    """Measures each kind of work in a recipe, evaluations and saves. All ranks call this."""
    whole = Timeline.planned(recipe, len(data.train))
    timeline = Timeline.planned(quick(recipe, device, ranks.world), len(data.train))
    smaller = {
        segment.first: s for segment, s in zip(whole.segments, timeline.segments, strict=True)
    }
    steps: dict[str, Pace] = {}
    with untouched(state, device):
        for segment in kinds(whole):
            steps[kind(segment)] = _pace(
                smaller[segment.first], timeline, state, data, device, ranks, workers, fit_memory
            )
        device.undo_compile(state.model)
        evaluations = [
            _evaluation(spec, state, data, timeline.recipe, device, ranks, workers)
            for spec in protocols(recipe)
        ]
        save = save_seconds(state) if ranks.main else 0.0
    return Paces(steps, evaluations[0], sum(evaluations[1:]), save)


def _pace(
    segment: Segment,
    timeline: Timeline,
    state: TrainState,
    data: PackedDataset,
    device: Device,
    ranks: Ranks,
    workers: int,
    fit_memory: bool,
) -> Pace:
    stage, once = made_ready(
        segment, state, device, ranks, len(data.classes), fit_memory=fit_memory
    )
    with Loader(
        data.train,
        timeline,
        cycle(segment.steps_from(0)),
        rank=ranks.rank,
        world=ranks.world,
        workers=workers,
        prefetch=PREFETCH,
        pin_memory=device.pin_memory,
    ) as loader:
        seconds = step_seconds(stage, state, timeline, device.prefetch(loader))
    return Pace(once, seconds / segment.batch_size)


def _evaluation(
    spec: Eval,
    state: TrainState,
    data: PackedDataset,
    recipe: Recipe,
    device: Device,
    ranks: Ranks,
    workers: int,
) -> float:
    """Returns what an evaluation by a protocol takes: the largest share of all ranks."""
    ranks.begin(f"measuring an evaluation at {side(spec)} px")
    shown = quick_evaluation(spec, device)
    for at_least in (0.0, SECONDS):  # the first batch of all is slower
        with EvalLoader(
            data.val, shown, side(shown), workers=workers, pin_memory=device.pin_memory
        ) as loader:
            image = image_seconds(
                state.evaluated_model(),
                device.prefetch(loader),
                shown,
                recipe,
                device,
                at_least=at_least,
            )
    return image * -(-len(data.val) // ranks.world)
