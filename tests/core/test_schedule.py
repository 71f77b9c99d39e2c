"""Schedules against torch's, timm's and numpy's own."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError
from timm.scheduler import CosineLRScheduler

from pitstop.core.schedule import (
    Constant,
    Cosine,
    Curve,
    Keypoints,
    Knot,
    Linear,
    LrSchedule,
    OneCycle,
    Span,
    Step,
    Value,
    Varying,
    constant,
    value_curve,
)

EASES = ["linear", "cosine", "step"]
numbers = st.floats(-100, 100, allow_nan=False)
eases = st.sampled_from(EASES)
positions = st.integers(-50, 300)


def span(steps: int) -> Span:
    """An epoch is a step here, and 100% is all of them."""
    return Span(steps, lambda length: round(length.epochs(steps)))


def optimizer(lr: float) -> torch.optim.SGD:
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr, momentum=0.9)


def followed(scheduled, scheduler, steps: int, key: str = "lr") -> list[float]:
    """The values that a torch scheduler gives an optimizer at each of `steps` steps."""
    values = []
    for step in range(steps):
        if step:
            scheduler.step()
        values.append(scheduled.param_groups[0][key])
        scheduled.step()
    return values


def sampled(curve: Curve, steps: int) -> list[float]:
    return [curve(step) for step in range(steps)]


def close(values, oracle):
    np.testing.assert_allclose(values, oracle, rtol=0, atol=1e-12)


@st.composite
def curves(draw, ease=eases):
    at = sorted(draw(st.lists(st.integers(0, 200), min_size=1, max_size=6, unique=True)))
    return Curve(tuple(Knot(position, draw(numbers), draw(ease)) for position in at))


# Curves


@given(curves(), st.floats(0, 1000))
def test_a_curve_holds_before_its_first_and_after_its_last_knot(curve, far):
    assert curve(curve.knots[0].at - far - 1) == curve.knots[0].value
    assert curve(curve.knots[-1].at + far) == curve.knots[-1].value


@given(curves())
def test_a_curve_goes_through_its_knots(curve):
    for knot in curve.knots:
        assert curve(knot.at) == pytest.approx(knot.value, abs=1e-12)


@given(curves(), st.floats(0, 200))
def test_a_curve_never_leaves_the_values_on_either_side(curve, step):
    before = [knot for knot in curve.knots if knot.at <= step][-1:] or [curve.knots[0]]
    after = [knot for knot in curve.knots if knot.at > step][:1] or before
    low, high = sorted((before[0].value, after[0].value))
    assert low - 1e-9 <= curve(step) <= high + 1e-9


@given(curves(), st.integers(0, 10**6), positions)
def test_a_shifted_curve_is_the_same_later(curve, by, step):
    assert curve.shifted(by)(step + by) == curve(step)


@given(curves(ease=st.just("linear")))
def test_straight_lines_are_those_of_numpy(curve):
    steps = np.arange(-10, 210)
    oracle = np.interp(steps, [k.at for k in curve.knots], [k.value for k in curve.knots])
    close([curve(step) for step in steps], oracle)


@given(numbers, numbers, st.integers(1, 100))
def test_a_cosine_is_half_a_cosine(start, end, steps):
    curve = Curve((Knot(0, start, "cosine"), Knot(steps, end)))
    done = np.arange(steps + 1) / steps
    np.testing.assert_allclose(
        [curve(step) for step in range(steps + 1)],
        start + (end - start) * np.sin(done * np.pi / 2) ** 2,
        atol=1e-10,
    )


def test_a_step_holds_until_the_next_knot():
    curve = Curve((Knot(0, 1.0, "step"), Knot(10, 5.0, "step"), Knot(20, 2.0)))
    assert [curve(step) for step in (0, 9, 9.99, 10, 19, 20, 99)] == [1, 1, 1, 5, 5, 2, 2]


def test_of_knots_at_one_place_the_last_counts_from_there():
    curve = Curve((Knot(0, 0.0), Knot(10, 10.0), Knot(10, 3.0), Knot(20, 3.0)))
    assert [curve(9), curve(10), curve(15)] == [pytest.approx(9), 3.0, 3.0]


@given(numbers, positions)
def test_a_constant_is_everywhere(value, step):
    assert constant(value)(step) == value


# OneCycle against torch


def torch_onecycle(steps, pct_start, anneal, **more):
    scheduled = optimizer(1.0)
    return scheduled, torch.optim.lr_scheduler.OneCycleLR(
        scheduled, 1.0, total_steps=steps, pct_start=pct_start, anneal_strategy=anneal, **more
    )


@pytest.mark.parametrize("anneal", ["cos", "linear"])
@pytest.mark.parametrize("pct_start", [0.1, 0.3, 0.45, 0.9])
@pytest.mark.parametrize("steps", [12, 57, 100, 1001])
def test_onecycle_is_torchs(steps, pct_start, anneal):
    more = {"div_factor": 20.0, "final_div_factor": 300.0}
    ours = OneCycle(pct_start=pct_start, anneal_strategy=anneal, **more).curve(span(steps))
    oracle = followed(
        *torch_onecycle(steps, pct_start, anneal, cycle_momentum=False, **more), steps
    )
    close(sampled(ours, steps), oracle)


@pytest.mark.parametrize("anneal", ["cos", "linear"])
@pytest.mark.parametrize("steps", [12, 57, 1001])
def test_onecycle_momentum_is_torchs(steps, anneal):
    more = {"base_momentum": 0.85, "max_momentum": 0.95}
    ours = OneCycle(anneal_strategy=anneal, **more).momentum_curve(span(steps))
    assert ours is not None
    oracle = followed(*torch_onecycle(steps, 0.3, anneal, **more), steps, key="momentum")
    close(sampled(ours, steps), oracle)
    assert min(oracle) < 0.86


@pytest.mark.parametrize("pct_start", [0.0, 0.05, 1.0])
def test_onecycle_whose_peak_is_at_an_end_is_torchs(pct_start):
    ours = OneCycle(pct_start=pct_start).curve(span(10))
    oracle = followed(*torch_onecycle(10, pct_start, "cos", cycle_momentum=False), 10)
    close(sampled(ours, 10), oracle)


def test_onecycle_leaves_the_momentum_alone_unless_told():
    assert OneCycle().momentum_curve(span(100)) is None


@pytest.mark.parametrize("given_one", ["base_momentum", "max_momentum"])
def test_onecycle_wants_both_momenta(given_one):
    with pytest.raises(ValidationError, match="both base_momentum and max_momentum"):
        OneCycle(**{given_one: 0.9})


# Warm-up and what follows


@pytest.mark.parametrize("final", [0.0, 0.01])
@pytest.mark.parametrize(("warmup", "init"), [(0, 0.0), (1, 0.1), (5, 0.0), (7, 1e-3)])
@pytest.mark.parametrize("steps", [10, 57, 300])
def test_warmup_and_cosine_are_timms(steps, warmup, init, final):
    scheduled = optimizer(1.0)
    scheduler = CosineLRScheduler(
        scheduled,
        t_initial=steps - warmup,
        lr_min=final,
        warmup_t=warmup,
        warmup_lr_init=init,
        warmup_prefix=True,
        t_in_epochs=False,
    )
    oracle = []
    for step in range(steps):
        scheduler.step_update(step)
        oracle.append(scheduled.param_groups[0]["lr"])
    ours = Cosine(warmup=f"{warmup}ep", warmup_init=init, final=final).curve(span(steps))
    close(sampled(ours, steps), oracle)


@given(st.integers(1, 200), st.floats(0, 1), st.floats(0, 1))
def test_linear_falls_straight_from_the_peak_to_final(steps, final, warmup_share):
    warmup = int(warmup_share * (steps - 1))
    ours = Linear(warmup=f"{warmup}ep", final=final).curve(span(steps))
    rise = ([0], [0.0]) if warmup else ([], [])
    oracle = np.interp(range(steps + 1), [*rise[0], warmup, steps], [*rise[1], 1.0, final])
    close(sampled(ours, steps + 1), oracle)


def test_linear_without_warmup_is_torchs():
    scheduled = optimizer(1.0)
    scheduler = torch.optim.lr_scheduler.LinearLR(scheduled, 1.0, 0.25, total_iters=40)
    close(sampled(Linear(final=0.25).curve(span(40)), 60), followed(scheduled, scheduler, 60))


def test_constant_rises_and_stays():
    ours = Constant(warmup="4ep", warmup_init=0.2).curve(span(10))
    close(sampled(ours, 7), [0.2, 0.4, 0.6, 0.8, 1, 1, 1])
    assert sampled(Constant().curve(span(3)), 3) == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("milestones", [[30], [10, 30, 60], [60, 10, 30], [25, 25]])
@pytest.mark.parametrize("gamma", [0.1, 0.5])
def test_step_is_torchs_multistep(milestones, gamma):
    scheduled = optimizer(1.0)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(scheduled, sorted(milestones), gamma)
    ours = Step(milestones=[f"{at}ep" for at in milestones], gamma=gamma).curve(span(100))
    close(sampled(ours, 100), followed(scheduled, scheduler, 100))


def test_step_rises_first():
    ours = Step(warmup="2ep", milestones=["50%"]).curve(span(8))
    close(sampled(ours, 8), [0, 0.5, 1, 1, 0.1, 0.1, 0.1, 0.1])


def test_step_refuses_a_milestone_within_the_warmup():
    with pytest.raises(ValidationError, match="milestone 3ep lies within the warmup of 5ep"):
        Step(warmup="5ep", milestones=["3ep", "10ep"])


@given(st.sampled_from([Constant, Linear, Cosine]), st.integers(1, 99), st.floats(0, 1))
def test_every_warmup_is_a_straight_rise_to_the_peak(family, warmup, init):
    ours = family(warmup=f"{warmup}ep", warmup_init=init).curve(span(100))
    close(sampled(ours, warmup + 1), np.linspace(init, 1.0, warmup + 1))


# Keypoints and values


@given(
    st.lists(
        st.tuples(st.integers(0, 100), numbers), min_size=1, max_size=6, unique_by=lambda p: p[0]
    )
)
def test_linear_keypoints_are_numpys_interp_in_any_order_of_writing(points):
    ours = Varying(keypoints=[(f"{at}%", value) for at, value in points]).curve(span(100))
    oracle = np.interp(range(101), *zip(*sorted(points), strict=True))
    close(sampled(ours, 101), oracle)


@pytest.mark.parametrize(
    ("interpolation", "middle"), [("linear", 5.0), ("step", 0.0), ("cosine", 5.0)]
)
def test_keypoints_are_joined_as_told(interpolation, middle):
    ours = Keypoints(keypoints=[("0ep", 0.0), ("20ep", 10.0)], interpolation=interpolation)
    curve = ours.curve(span(40))
    assert [curve(0), curve(10), curve(20), curve(39)] == pytest.approx([0, middle, 10, 10])
    quarter = {"linear": 2.5, "step": 0.0, "cosine": 5 - 5 * math.cos(math.pi / 4)}
    assert curve(5) == pytest.approx(quarter[interpolation])


def test_a_value_is_a_number_or_keypoints():
    read = TypeAdapter(Value).validate_python
    assert sampled(value_curve(read(0.9), span(10)), 3) == [0.9, 0.9, 0.9]
    rising = value_curve(read({"keypoints": [[0, 0.0], ["100%", 1.0]]}), span(10))
    close(sampled(rising, 11), np.arange(11) / 10)


@pytest.mark.parametrize("bad", ["fast", None, [1], {"points": [[0, 1]]}])
def test_a_value_is_nothing_else(bad):
    with pytest.raises(ValidationError):
        TypeAdapter(Value).validate_python(bad)


def test_a_schedule_may_be_given_by_its_name_alone():
    read = TypeAdapter(LrSchedule).validate_python
    assert read("cosine") == Cosine()
    assert read({"name": "onecycle", "pct_start": 0.2}) == OneCycle(pct_start=0.2)


@given(
    st.sampled_from(
        [Constant(), Linear(), Cosine(warmup="30%"), OneCycle(), Step(milestones=["50%"])]
    ),
    st.integers(1, 50),
)
def test_schedules_stay_between_zero_and_the_peak(schedule, steps):
    assert all(0 <= value <= 1 for value in sampled(schedule.curve(span(steps)), steps))
