"""The timeline: everything that varies during a run, as a pure function of the step.

`Timeline(recipe, amendments, num_samples)` cuts the run into segments of constant shapes and tells
for any step its settings, its position in the data and whether an evaluation is due. The plan, the
run and a resumed run all ask this one object.

Positions. The run walks the endless concatenation of epoch permutations, so a batch may straddle
two epochs and no sample is dropped. Phases of equal data fraction share one walk; a change of
fraction starts a new one. A phase ends with the first batch that reaches its last sample.
Skipped samples move where images are taken from, and nothing else: epochs count steps.
"""

import math
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter

from pitstop.core.errors import InputError
from pitstop.core.length import Length
from pitstop.core.recipe import ColorJitter, Ema, Mix, Phase, PhaseSettings, RandAugment, Recipe
from pitstop.core.schedule import Curve, Linear, Span, Varying, constant, value_curve
from pitstop.core.strict import Strict

RAMP_SIZES = 4
"""A ramp of resolutions has at most this many: each one costs a compilation."""

RAMP_MULTIPLE = 16
"""The sizes between a ramp's ends are multiples of this many pixels."""


@dataclass(frozen=True)
class Curves:
    """The continuous values of a segment, by the run's step."""

    lr: Curve
    momentum: Curve
    mixup_alpha: Curve
    cutmix_alpha: Curve
    ema_half_life: Curve
    magnitude: Curve
    brightness: Curve
    contrast: Curve
    saturation: Curve
    hue: Curve
    erasing_prob: Curve

    def shifted(self, steps: int) -> "Curves":
        return Curves(*(getattr(self, curve.name).shifted(steps) for curve in fields(self)))


@dataclass(frozen=True)
class Segment:
    """Steps `first` to `last` (exclusive) of constant shapes."""

    recipe: Recipe
    phase: Phase
    phase_index: int
    resolution: int
    until: float
    """The run's epochs at its planned end, which its last batch may go past."""
    num_samples: int
    """Images in the phase's subset: the first floor(data_fraction x N)."""
    first: int
    last: int
    walk: int
    """Which walk: the key, with the pass, of the permutation."""
    walk_first: int
    """Samples of the walk that are done before step `first`, without skipped ones."""
    walk_epoch: float
    """The run's epochs at the start of the walk."""
    walk_passes: int
    """Passes, begun ones included, of all walks before."""
    skipped: int
    """Samples of the walk that are left out: by so many its images lie further on."""
    curves: Curves = field(repr=False)

    @property
    def batch_size(self) -> int:
        return self.phase.batch_size

    @property
    def steps(self) -> int:
        return self.last - self.first

    def walk_position(self, step: int) -> int:
        """Returns the samples of the walk that are done before `step`, without skipped ones."""
        return self.walk_first + (step - self.first) * self.batch_size

    def image_position(self, step: int) -> int:
        """Returns where in the walk, in samples, the images of `step` begin."""
        return self.walk_position(step) + self.skipped

    def epoch(self, step: int) -> float:
        """Returns the epochs done before `step`, over the whole run."""
        return self.walk_epoch + self.walk_position(step) / self.num_samples

    def step_at_epoch(self, epoch: float) -> int:
        """Returns the step, rounded and not bounded to the segment, at which `epoch` is done."""
        samples = (epoch - self.walk_epoch) * self.num_samples
        return self.first + round((samples - self.walk_first) / self.batch_size)

    def steps_from(self, step: int) -> range:
        """Returns the segment's steps, without those before `step`."""
        return range(max(step, self.first), self.last)


@dataclass(frozen=True)
class StepSettings:
    """All that one step needs to know, apart from its images."""

    step: int
    epoch: float
    lr: float
    momentum: float
    mixup_alpha: float
    cutmix_alpha: float
    ema_decay: float
    """Of an update of the average after this step, for all steps since the one before."""
    magnitude: float
    """RandAugment's; 0 without it."""
    brightness: float
    """Color jitter's; so are the next three."""
    contrast: float
    saturation: float
    hue: float
    erasing_prob: float
    begins_phase: bool
    segment: Segment = field(repr=False)


@dataclass(frozen=True)
class Position:
    """Where in the data a step's batch begins."""

    walk: int
    pass_: int
    """The pass over the subset, from 0 in each walk."""
    index: int
    """The place within the pass's permutation."""


class Extend(Strict):
    """One more phase after the planned end: the last structure, lr falling straight to 0."""

    kind: Literal["extend"] = "extend"
    epochs: float = Field(gt=0)
    lr: float = Field(gt=0)


class Rebase(Strict):
    """Another recipe from the current epoch position on."""

    kind: Literal["rebase"] = "rebase"
    recipe: Recipe


class FoundLr(Strict):
    """What `lr: auto` comes to, at step 0."""

    kind: Literal["lr"] = "lr"
    lr: float = Field(gt=0)
    """The peak."""


class Fit(Strict):
    """The recipe with as many epochs as fit so many minutes, in place of the run's, at step 0."""

    kind: Literal["fit"] = "fit"
    minutes: float = Field(gt=0)
    recipe: Recipe


class MicroBatch(Strict):
    """More micro-batches a batch for the rest of the segment: those before did not fit."""

    kind: Literal["micro_batch"] = "micro_batch"
    grad_accum_steps: int = Field(ge=1)


class SkipData(Strict):
    """Other images from the step on: those that the next `batches` steps would have had never come.

    In each walk of which these steps would have drawn, all images from here on are taken as many
    samples further on: in the middle of a phase, `batches` x batch_size. The walk stays what it
    was, the endless concatenation of the same permutations, so this may leave out the end of a
    pass, or whole ones. Epochs, evaluations, schedules and the ends of phases stay those by the
    step. Skips add up. An extension, or another recipe, that goes on in the walk goes on behind
    what was skipped.
    """

    kind: Literal["skip_data"] = "skip_data"
    batches: int = Field(ge=1)


class LowerLr(Strict):
    """The lr times `factor`, from the step to the end of the run as it is planned by then.

    Factors multiply. What is decided later (an extension, another recipe) states its own lr, which
    is not lowered.
    """

    kind: Literal["lower_lr"] = "lower_lr"
    factor: float = Field(gt=0, lt=1)


class Amendment(Strict):
    """What was decided while running, at `step`. It never alters a step before that."""

    step: int = Field(ge=0)
    change: Annotated[
        Extend | Rebase | FoundLr | Fit | MicroBatch | SkipData | LowerLr,
        Field(discriminator="kind"),
    ]


_AMENDMENTS = TypeAdapter(tuple[Amendment, ...])


def parse_amendments(data: Any) -> tuple[Amendment, ...]:
    """Returns the amendments that `dump_amendments` wrote."""
    return _AMENDMENTS.validate_python(data)


def dump_amendments(amendments: Sequence[Amendment]) -> list[dict[str, Any]]:
    """Returns amendments as plain data, for a checkpoint or a record."""
    return _AMENDMENTS.dump_python(tuple(amendments), mode="json")


class Timeline:
    """The plan of a run.

    Args:
        recipe: a loaded recipe. Where it says `lr: auto`, the first amendment is what was found;
            `planned` is for before that.
        amendments: in the order in which they were decided.
        num_samples: training images.

    Raises:
        InputError: the recipe does not fit the data: a batch larger than a phase's subset, a
            phase shorter than a batch, a warm-up longer than its span. Or a recipe of `lr: auto`
            comes in by `--rebase` where none was found.
    """

    def __init__(
        self, recipe: Recipe, amendments: Sequence[Amendment] = (), *, num_samples: int
    ) -> None:
        self.num_samples = num_samples
        self.lr_is_fallback = False
        found = next((a.change.lr for a in amendments if isinstance(a.change, FoundLr)), None)
        fit = next((a.change.recipe for a in amendments if isinstance(a.change, Fit)), recipe)
        segments = _plan(_with_found_lr(fit, found), num_samples)
        ends = {segments[-1].last}
        for amendment in amendments:
            step = amendment.step
            match amendment.change:
                case FoundLr() | Fit():
                    continue
                case MicroBatch(grad_accum_steps=steps):
                    segments = _accumulating(segments, step, steps)
                case SkipData(batches=batches):
                    segments = _skipping(segments, step, batches)
                case LowerLr(factor=factor):
                    segments = _lowered(segments, step, factor)
                case Extend() as extend:
                    segments += (_extension(segments[-1], extend),)
                case Rebase(recipe=changed):
                    segments = _rebased(segments, step, _with_found_lr(changed, found), num_samples)
                    ends = {end for end in ends if end <= step}
            ends.add(segments[-1].last)
        self.segments: tuple[Segment, ...] = segments
        self._firsts = [segment.first for segment in segments]
        self.evaluations: frozenset[int] = frozenset(ends).union(
            *(_epoch_ends(segment, segment.recipe.eval.every) for segment in segments)
        )

    @classmethod
    def planned(cls, recipe: Recipe, num_samples: int) -> "Timeline":
        """Returns the plan of a new run; `lr: auto` is the recipe's declared fallback."""
        fallback = recipe.lr_finder.fallback if recipe.lr_finder else 0.0
        timeline = cls(recipe.with_lr(fallback), num_samples=num_samples)
        timeline.lr_is_fallback = recipe.has_auto_lr()
        return timeline

    @property
    def last(self) -> int:
        """The number of steps of the whole run."""
        return self.segments[-1].last

    @property
    def recipe(self) -> Recipe:
        """The recipe in force at the end."""
        return self.segments[-1].recipe

    @property
    def epochs(self) -> float:
        """The epochs of the whole run, up to its last batch."""
        return self.segments[-1].epoch(self.last)

    def segment_at(self, step: int) -> Segment:
        """Returns the segment of `step`; past the end, the last one."""
        return self.segments[bisect_right(self._firsts, step) - 1]

    def segments_from(self, step: int) -> Iterator[Segment]:
        """Yields the segments that have steps left at `step`."""
        return (segment for segment in self.segments if segment.last > step)

    def settings_at(self, step: int) -> StepSettings:
        """Returns the settings of `step`, 0 <= step < last."""
        segment = self.segment_at(step)
        curves = segment.curves
        half_life = curves.ema_half_life(step)
        return StepSettings(
            step=step,
            epoch=segment.epoch(step),
            lr=curves.lr(step),
            momentum=curves.momentum(step),
            mixup_alpha=curves.mixup_alpha(step),
            cutmix_alpha=curves.cutmix_alpha(step),
            ema_decay=_ema_decay(segment.recipe.ema, half_life, step),
            magnitude=curves.magnitude(step),
            brightness=curves.brightness(step),
            contrast=curves.contrast(step),
            saturation=curves.saturation(step),
            hue=curves.hue(step),
            erasing_prob=curves.erasing_prob(step),
            begins_phase=self.begins_phase(step),
            segment=segment,
        )

    def begins_phase(self, step: int) -> bool:
        """Tells whether `step` is the first of a phase; all sizes of a ramp are one phase."""
        before = self.segment_at(step - 1).phase_index if step > 0 else None
        return before != self.segment_at(step).phase_index

    def position(self, step: int) -> Position:
        """Returns where in the data the batch of `step` begins."""
        segment = self.segment_at(step)
        pass_, index = divmod(segment.image_position(step), segment.num_samples)
        return Position(segment.walk, pass_, index)

    def epoch_ends(self, every: int) -> frozenset[int]:
        """Returns the steps done when each `every`-th epoch is complete."""
        return frozenset(end for s in self.segments for end in _epoch_ends(s, every))

    def epoch(self, step: int) -> float:
        """Returns the epochs done before `step`; `epoch(last)` is that of the end."""
        return self.segment_at(max(0, step - 1)).epoch(step)


def _ema_decay(ema: Ema | None, half_life: float, step: int) -> float:
    """Returns the decay of an update: that of a step, to the power of the steps it stands for."""
    if ema is None:
        return 0.0
    return min(0.5 ** (1 / half_life), (1 + step) / (10 + step)) ** ema.every


def _with_found_lr(recipe: Recipe, found: float | None) -> Recipe:
    if not recipe.has_auto_lr():
        return recipe
    if found is None:
        raise InputError(
            f"recipe {recipe.name}: lr: auto was not searched for in this run: give a number"
        )
    return recipe.with_lr(found)


def _epoch_ends(segment: Segment, every: int) -> Iterator[int]:
    """Yields the steps done right after the batches that complete every `every`-th pass."""
    n = segment.num_samples
    begin, end = segment.walk_position(segment.first), segment.walk_position(segment.last)
    for passes in range(begin // n + 1, end // n + 1):
        if (segment.walk_passes + passes) % every == 0:
            yield segment.first + -(-(passes * n - begin) // segment.batch_size)


# Planning: from a recipe to segments


@dataclass(frozen=True)
class _Stretch:
    """A phase, or the part of its ramp at one size, in epochs of the run."""

    phase_index: int
    resolution: int
    begin: float
    until: float


@dataclass(frozen=True)
class _Place:
    """Where a run stands: what the segments that are laid next go on from."""

    step: int
    epoch: float
    walk: int
    walk_position: int
    walk_epoch: float
    walk_passes: int
    skipped: int
    num_samples: int | None
    """Of the walk; None when the next segment has to begin another."""


_START = _Place(0, 0.0, -1, 0, 0.0, 0, 0, None)


def _plan(recipe: Recipe, num_samples: int) -> tuple[Segment, ...]:
    bare = _lay(recipe, num_samples, _START)
    run = Span(bare[-1].last, _step_at(bare, 0.0, recipe.epochs))
    planned: list[Segment] = []
    begun = 0.0
    for index, phase in enumerate(recipe.phases):
        own = [segment for segment in bare if segment.phase_index == index]
        first = own[0].first
        at = _step_at(own, begun, phase.epochs(), origin=first)
        curves = _curves(recipe, phase, run, Span(own[-1].last - first, at), first)
        planned += [replace(segment, curves=curves) for segment in own]
        begun += phase.epochs()
    return tuple(planned)


def _stretches(recipe: Recipe) -> Iterator[_Stretch]:
    begun = 0.0
    for index, phase in enumerate(recipe.phases):
        sizes = _ramp(phase)
        each = phase.epochs() / len(sizes)
        for k, size in enumerate(sizes):
            yield _Stretch(index, size, begun + k * each, begun + (k + 1) * each)
        begun += phase.epochs()


def _lay(recipe: Recipe, num_samples: int, place: _Place) -> list[Segment]:
    """Lays the recipe's stretches end to end from `place` on; without curves.

    A run that enters in the middle leaves out the stretches that are over, and those of which the
    batch before them has taken all.
    """
    segments: list[Segment] = []
    enters, epoch = place != _START, place.epoch
    for stretch in _stretches(recipe):
        if enters and stretch.until <= epoch:
            continue
        phase = recipe.phases[stretch.phase_index]
        subset = _subset(recipe, stretch.phase_index, num_samples)
        if subset != place.num_samples:
            place = _new_walk(place, max(stretch.begin, epoch), subset)
        target = round((stretch.until - place.walk_epoch) * subset)
        steps = -(-(target - place.walk_position) // phase.batch_size)
        if steps < 1:
            if enters:
                continue
            raise InputError(
                f"recipe {recipe.name}: phases.{stretch.phase_index} ({phase.name}): "
                f"{stretch.until - stretch.begin:.3g} epochs of {subset:,} images are less than "
                f"one batch of {phase.batch_size}: raise epochs or lower batch_size"
            )
        segment = Segment(
            recipe=recipe,
            phase=phase,
            phase_index=stretch.phase_index,
            resolution=stretch.resolution,
            until=stretch.until,
            num_samples=subset,
            first=place.step,
            last=place.step + steps,
            walk=place.walk,
            walk_first=place.walk_position,
            walk_epoch=place.walk_epoch,
            walk_passes=place.walk_passes,
            skipped=place.skipped,
            curves=_STILL,
        )
        segments.append(segment)
        place = replace(
            place,
            step=segment.last,
            walk_position=segment.walk_position(segment.last),
        )
    return segments


def _new_walk(place: _Place, epoch: float, subset: int) -> _Place:
    before = -(-place.walk_position // place.num_samples) if place.num_samples else 0
    return replace(
        place,
        walk=place.walk + 1,
        walk_position=0,
        walk_epoch=epoch,
        walk_passes=place.walk_passes + before,
        skipped=0,
        num_samples=subset,
    )


_STILL = Curves(*[constant(0.0)] * len(fields(Curves)))


def _subset(recipe: Recipe, index: int, num_samples: int) -> int:
    """Returns how many images the phase trains on, having checked that they fill a batch."""
    phase = recipe.phases[index]
    subset = math.floor(phase.data_fraction * num_samples + 1e-9)
    where = f"recipe {recipe.name}: phases.{index}"
    if subset == 0:
        raise InputError(
            f"{where}.data_fraction {phase.data_fraction:g} of {num_samples:,} images is none: "
            "raise it"
        )
    if phase.batch_size > subset:
        raise InputError(
            f"{where}.batch_size {phase.batch_size} is larger than the phase's {subset:,} images: "
            f"set it to {subset} or less"
        )
    return subset


def _ramp(phase: PhaseSettings) -> list[int]:
    """Returns the distinct sizes of the phase's ramp, in ascending order."""
    if isinstance(phase.resolution, int):
        return [phase.resolution]
    low, high = phase.resolution
    inner = [low + (high - low) * k / (RAMP_SIZES - 1) for k in range(1, RAMP_SIZES - 1)]
    rounded = {round(size / RAMP_MULTIPLE) * RAMP_MULTIPLE for size in inner}
    return sorted({low, high} | {size for size in rounded if low < size < high})


def _step_at(
    segments: list[Segment], begun: float, epochs: float, origin: int = 0
) -> Callable[[Length], int]:
    """Returns the function from a length, measured from epoch `begun`, to steps from `origin`."""

    def step_at(length: Length) -> int:
        epoch = begun + length.epochs(epochs)
        segment = next((s for s in segments if epoch <= s.until), segments[-1])
        return max(segment.step_at_epoch(epoch), segment.first) - origin

    return step_at


def _curves(recipe: Recipe, phase: Phase, run: Span, own: Span, first: int) -> Curves:
    """Returns the phase's curves in the run's steps."""
    schedule = phase.lr_schedule
    span, start = (run, 0) if schedule.over == "run" else (own, first)
    shape = _ascending(schedule.curve(span), span, recipe)
    momentum = schedule.momentum_curve(span)
    if momentum is None:
        momentum, start_momentum = value_curve(recipe.optimizer.momentum, run), 0
    else:
        start_momentum = start

    def over_phase(value: float | Varying) -> Curve:
        return value_curve(value, own).shifted(first)

    def stronger(value: float | Varying, highest: float) -> Curve:
        return replace(_scaled(over_phase(value), phase.augment_scale), highest=highest)

    mix, policy = phase.mix or Mix(), phase.augment
    jitter, erasing = phase.color_jitter or ColorJitter(), phase.random_erasing
    magnitude, top = 0.0, 0.0
    if isinstance(policy, RandAugment):
        magnitude, top = policy.magnitude, policy.highest_magnitude
    return Curves(
        lr=_scaled(shape, phase.peak_lr()).shifted(start),
        momentum=momentum.shifted(start_momentum),
        mixup_alpha=over_phase(mix.mixup_alpha),
        cutmix_alpha=over_phase(mix.cutmix_alpha),
        ema_half_life=value_curve(recipe.ema.half_life if recipe.ema else 0.0, run),
        magnitude=stronger(magnitude, top),
        brightness=stronger(jitter.brightness, 1.0),
        contrast=stronger(jitter.contrast, 1.0),
        saturation=stronger(jitter.saturation, 1.0),
        hue=stronger(jitter.hue, 0.5),
        erasing_prob=stronger(erasing.prob if erasing else 0.0, 1.0),
    )


def _ascending(curve: Curve, span: Span, recipe: Recipe) -> Curve:
    """Returns the curve, having checked that a warm-up ends before its schedule does."""
    if any(a.at > b.at for a, b in zip(curve.knots, curve.knots[1:], strict=False)):
        raise InputError(
            f"recipe {recipe.name}: lr_schedule: the warmup does not fit the {span.steps} steps "
            "that the schedule covers: shorten warmup or raise epochs"
        )
    return curve


def _scaled(curve: Curve, by: float) -> Curve:
    return Curve(tuple(replace(knot, value=knot.value * by) for knot in curve.knots))


# Amending: from segments to segments


def _extension(end: Segment, extend: Extend) -> Segment:
    """Returns the segment that goes on after `end`, in its walk."""
    steps = max(1, math.ceil(extend.epochs * end.num_samples / end.batch_size))
    fall = Linear().curve(Span(steps, lambda _: 0))
    here = end.last
    held = {f.name: constant(getattr(end.curves, f.name)(here - 1)) for f in fields(Curves)}
    return replace(
        end,
        phase=end.phase.model_copy(
            update={
                "name": "extension",
                "duration": Length(extend.epochs, "ep"),
                "optimizer_state": "keep",
            }
        ),
        phase_index=end.phase_index + 1,
        first=here,
        last=here + steps,
        walk_first=end.walk_position(here),
        curves=Curves(**{**held, "lr": _scaled(fall, extend.lr).shifted(here)}),
    )


def _cut(segments: tuple[Segment, ...], step: int) -> Iterator[Segment]:
    """Yields the segments, the one that goes on past `step` in two: before it, and from it on."""
    for segment in segments:
        if segment.first < step < segment.last:
            yield replace(segment, last=step)
            yield replace(segment, first=step, walk_first=segment.walk_position(step))
        else:
            yield segment


def _accumulating(segments: tuple[Segment, ...], step: int, parts: int) -> tuple[Segment, ...]:
    """Returns the segments with that of `step` in so many micro-batches from there on."""
    more = {"grad_accum_steps": parts}
    return tuple(
        replace(segment, phase=segment.phase.model_copy(update=more))
        if segment.first == step
        else segment
        for segment in _cut(segments, step)
    )


def _skipping(segments: tuple[Segment, ...], step: int, batches: int) -> tuple[Segment, ...]:
    """Returns the segments, from `step` on behind what its next `batches` steps would have had."""
    laid = [*_cut(segments, step)]
    left_out: Counter[int] = Counter()
    for segment in laid:
        steps = range(max(segment.first, step), min(segment.last, step + batches))
        left_out[segment.walk] += len(steps) * segment.batch_size
    return tuple(
        replace(segment, skipped=segment.skipped + left_out[segment.walk])
        if segment.first >= step
        else segment
        for segment in laid
    )


def _lowered(segments: tuple[Segment, ...], step: int, factor: float) -> tuple[Segment, ...]:
    """Returns the segments with the lr times `factor` from `step` on."""
    return tuple(
        replace(segment, curves=replace(segment.curves, lr=_scaled(segment.curves.lr, factor)))
        if segment.first >= step
        else segment
        for segment in _cut(segments, step)
    )


def _rebased(
    segments: tuple[Segment, ...], step: int, recipe: Recipe, num_samples: int
) -> tuple[Segment, ...]:
    """Returns the segments cut off at `step` and what the new recipe lays from that epoch on.

    The walk goes on where it is as long as the seed and the subset stay the same. Each segment has
    the curves that it has in the new recipe's own plan, moved to where it begins now.
    """
    past = [replace(s, last=min(s.last, step)) for s in segments if s.first < step]
    here = next((s for s in segments if s.last > step), segments[-1])
    epoch = here.epoch(step)
    place = _Place(
        step=step,
        epoch=epoch,
        walk=here.walk,
        walk_position=here.walk_position(step),
        walk_epoch=here.walk_epoch,
        walk_passes=here.walk_passes,
        skipped=here.skipped,
        num_samples=here.num_samples,
    )
    if recipe.seed != here.recipe.seed:
        place = replace(_new_walk(place, epoch, 0), num_samples=None)
    laid = _lay(recipe, num_samples, place)
    if not laid:
        raise InputError(
            f"recipe {recipe.name}: epochs: the run is at epoch {epoch:.2f} and the changed recipe "
            f"ends at {recipe.epochs:.2f}: give it more"
        )
    return (*past, *_with_planned_curves(laid, _plan(recipe, num_samples), epoch))


def _with_planned_curves(
    laid: list[Segment], planned: tuple[Segment, ...], epoch: float
) -> Iterator[Segment]:
    """Yields the laid segments with their curves; the first enters its plan at `epoch`."""
    plans = {(plan.phase_index, plan.resolution): plan for plan in planned}
    for segment in laid:
        plan = plans[segment.phase_index, segment.resolution]
        begin = plan.first
        if segment is laid[0]:
            begin = min(max(plan.step_at_epoch(epoch), plan.first), plan.last - 1)
        yield replace(segment, curves=plan.curves.shifted(segment.first - begin))
