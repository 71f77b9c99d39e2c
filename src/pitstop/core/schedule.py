"""Schedules: values that vary over a span of steps, as keypoints joined by curves.

A schedule is data (a pydantic model, as written in a recipe). Given the length of its span it
becomes a `Curve`: a pure function from step to value that keeps no state. Each named family is
nothing but a way of placing knots.
"""

import math
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Discriminator, Field, Tag, model_validator

from pitstop.core.length import Length
from pitstop.core.strict import Strict

Ease = Literal["linear", "cosine", "step"]
"""How a value goes on to the next knot: straight, along half a cosine, or held until there."""


@dataclass(frozen=True)
class Knot:
    """A value at a position in steps, and the curve by which it goes on to the next knot."""

    at: float
    value: float
    ease: Ease = "linear"


@dataclass(frozen=True)
class Curve:
    """A pure function of the step, given by knots in ascending order.

    Before the first knot and after the last it holds their values. Of several knots at the same
    position the last one counts from there on. No value is above `highest`.
    """

    knots: tuple[Knot, ...]
    highest: float = math.inf

    def __call__(self, step: float) -> float:
        """Returns the value at `step`, counted from the beginning of the curve's span."""
        return min(self._between_knots(step), self.highest)

    def _between_knots(self, step: float) -> float:
        after = bisect_right(self.knots, step, key=lambda knot: knot.at)
        if after == 0:
            return self.knots[0].value
        start = self.knots[after - 1]
        if after == len(self.knots) or start.ease == "step":
            return start.value
        end = self.knots[after]
        done = (step - start.at) / (end.at - start.at)
        if start.ease == "linear":
            return (end.value - start.value) * done + start.value
        return end.value + (start.value - end.value) / 2.0 * (math.cos(math.pi * done) + 1)

    def shifted(self, steps: int) -> "Curve":
        """Returns the same curve, `steps` later."""
        moved = tuple(Knot(knot.at + steps, knot.value, knot.ease) for knot in self.knots)
        return replace(self, knots=moved)


def constant(value: float) -> Curve:
    """Returns the curve that is `value` everywhere."""
    return Curve((Knot(0, value),))


@dataclass(frozen=True)
class Span:
    """The steps that a schedule covers, and where a length measured from its start falls."""

    steps: int
    step_at: Callable[[Length], int]


class Schedule(Strict):
    """What the families share. Learning-rate schedules are in units of the peak `lr`."""

    over: Literal["run", "phase"] = "run"
    """What the curve spans."""

    def curve(self, span: Span) -> Curve:
        """Returns the schedule's curve over `span`, in steps from the span's start."""
        raise NotImplementedError

    def momentum_curve(self, span: Span) -> Curve | None:
        """Returns the momentum that goes with the schedule, None where it has no say in it."""
        return None


class Warmup(Schedule):
    """A linear rise from `warmup_init` to 1 over `warmup`, as in timm with `warmup_prefix`."""

    warmup: Length = Length(0, "ep")
    """Length of a straight rise to the peak."""
    warmup_init: float = Field(default=0.0, ge=0)
    """The beginning of that rise."""

    def rise(self, span: Span) -> list[Knot]:
        """Returns the knots of the rise, to which a family adds what follows from its end."""
        top = span.step_at(self.warmup)
        return [Knot(0, self.warmup_init)] if top > 0 else []


class Constant(Warmup):
    """The peak throughout."""

    name: Literal["constant"] = "constant"

    def curve(self, span: Span) -> Curve:
        return Curve((*self.rise(span), Knot(span.step_at(self.warmup), 1.0)))


class Linear(Warmup):
    """From the peak straight to `final`."""

    name: Literal["linear"] = "linear"
    final: float = Field(default=0.0, ge=0)
    """The end of a straight line from the peak."""

    def curve(self, span: Span) -> Curve:
        top = Knot(span.step_at(self.warmup), 1.0)
        return Curve((*self.rise(span), top, Knot(span.steps, self.final)))


class Cosine(Warmup):
    """From the peak to `final` along half a cosine (SGDR without restarts, arXiv 1608.03983)."""

    name: Literal["cosine"] = "cosine"
    final: float = Field(default=0.0, ge=0)
    """The end of half a cosine from the peak."""

    def curve(self, span: Span) -> Curve:
        top = Knot(span.step_at(self.warmup), 1.0, "cosine")
        return Curve((*self.rise(span), top, Knot(span.steps, self.final)))


class Step(Warmup):
    """Multiplied by `gamma` at each milestone, as torch's MultiStepLR."""

    name: Literal["step"] = "step"
    milestones: tuple[Length, ...] = Field(min_length=1)
    """Where it drops, such as `[30ep, 60ep, 80ep]`."""
    gamma: float = Field(default=0.1, gt=0)
    """The factor of each drop."""

    def curve(self, span: Span) -> Curve:
        drops = sorted(span.step_at(milestone) for milestone in self.milestones)
        knots = [Knot(at, self.gamma ** (i + 1), "step") for i, at in enumerate(drops)]
        return Curve((*self.rise(span), Knot(span.step_at(self.warmup), 1.0, "step"), *knots))

    @model_validator(mode="after")
    def _warmup_comes_first(self) -> "Step":
        units = {self.warmup.unit, *(milestone.unit for milestone in self.milestones)}
        early = [str(m) for m in self.milestones if m.amount <= self.warmup.amount]
        if len(units) == 1 and early:
            raise ValueError(f"milestone {early[0]} lies within the warmup of {self.warmup}")
        return self


class OneCycle(Schedule):
    """One cycle up and down (Smith, arXiv 1708.07120), exactly as torch's OneCycleLR.

    From 1/div_factor to 1 within `pct_start` of the steps, then to
    1/(div_factor x final_div_factor). With `base_momentum` and `max_momentum` the momentum moves
    the other way; without them it stays the optimizer's.
    """

    name: Literal["onecycle"] = "onecycle"
    pct_start: float = Field(default=0.3, ge=0, le=1)
    """Share of the steps that rises."""
    div_factor: float = Field(default=25.0, gt=0)
    """It begins at `1 / div_factor`."""
    final_div_factor: float = Field(default=1e4, gt=0)
    """It ends at `1 / (div_factor x final_div_factor)`."""
    anneal_strategy: Literal["cos", "linear"] = "cos"
    """The form of both sides."""
    base_momentum: float | None = Field(default=None, ge=0, lt=1)
    """Momentum at the peak. Give both momenta, or neither."""
    max_momentum: float | None = Field(default=None, ge=0, lt=1)
    """Momentum at both ends."""

    @model_validator(mode="after")
    def _both_or_neither(self) -> "OneCycle":
        if (self.base_momentum is None) != (self.max_momentum is None):
            raise ValueError("give both base_momentum and max_momentum, or neither")
        return self

    def curve(self, span: Span) -> Curve:
        initial = 1.0 / self.div_factor
        return self._cycle(span, initial, 1.0, initial / self.final_div_factor)

    def momentum_curve(self, span: Span) -> Curve | None:
        if self.base_momentum is None or self.max_momentum is None:
            return None
        return self._cycle(span, self.max_momentum, self.base_momentum, self.max_momentum)

    def _cycle(self, span: Span, start: float, turn: float, end: float) -> Curve:
        ease: Ease = "cosine" if self.anneal_strategy == "cos" else "linear"
        top, last = self.pct_start * span.steps - 1, span.steps - 1
        rise = (Knot(0, start, ease),) if top > 0 else ()
        fall = (Knot(last, end),) if top < last else ()
        return Curve((*rise, Knot(top, turn, ease), *fall))


class Varying(Strict):
    """Any curve, as (position, value) pairs: `[[0, 0], [2ep, 1], [100%, 0]]`."""

    keypoints: tuple[tuple[Length, float], ...] = Field(min_length=1)
    """The curve, from point to point: where, and the value there in its own unit."""
    interpolation: Ease = "linear"
    """How it goes on to the next point: straight, along half a cosine, or held until there."""

    def curve(self, span: Span) -> Curve:
        """Returns the curve over `span`, in steps from the span's start."""
        knots = [Knot(span.step_at(at), value, self.interpolation) for at, value in self.keypoints]
        return Curve(tuple(sorted(knots, key=lambda knot: knot.at)))


class Keypoints(Varying, Schedule):
    """A learning rate along keypoints."""

    name: Literal["keypoints"] = "keypoints"

    @model_validator(mode="after")
    def _not_negative(self) -> "Keypoints":
        if any(value < 0 for _, value in self.keypoints):
            raise ValueError("a learning rate cannot be negative")
        return self


def named(value: Any) -> Any:
    """Returns a bare name as the mapping that it stands for."""
    return {"name": value} if isinstance(value, str) else value


LrSchedule = Annotated[
    Annotated[
        Constant | Linear | Cosine | Step | OneCycle | Keypoints, Field(discriminator="name")
    ],
    BeforeValidator(named),
]
"""A learning-rate schedule in a recipe: a name (`cosine`) or a mapping with a `name`."""


def _number_or_keypoints(value: Any) -> str:
    return "keypoints" if isinstance(value, dict | Varying) else "number"


Value = Annotated[
    Annotated[float, Tag("number")] | Annotated[Varying, Tag("keypoints")],
    Discriminator(_number_or_keypoints),
]
"""A number, or `{keypoints: [...]}` for one that varies."""


def within(low: float, high: float) -> AfterValidator:
    """Returns a check that a `Value` stays in low <= value < high."""

    def check(value: float | Varying) -> float | Varying:
        values = [v for _, v in value.keypoints] if isinstance(value, Varying) else [value]
        wrong = [v for v in values if not low <= v < high]
        if wrong:
            bound = f" and less than {high:g}" if math.isfinite(high) else ""
            raise ValueError(f"{wrong[0]:g} must be at least {low:g}{bound}")
        return value

    return AfterValidator(check)


def value_curve(value: float | Varying, span: Span) -> Curve:
    """Returns the curve of a recipe's `Value` over `span`."""
    return value.curve(span) if isinstance(value, Varying) else constant(value)
