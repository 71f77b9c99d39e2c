"""Runs that are played through."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pitstop.core.errors import InputError
from pitstop.plan.interruptions import expected_interruptions, expected_seconds
from pitstop.plan.simulate import Course, simulate

HOUR = Course(
    start=120, work=3600, interval=600, save=2, restart=180, dollars_per_hour=12.0
)  # fmt: skip


def test_without_interruptions_nothing_is_random() -> None:
    played = simulate(HOUR, 0, runs=10)
    assert HOUR.undisturbed == 120 + 3600 + 6 * 2
    assert played.minutes.tolist() == [HOUR.undisturbed / 60] * 10
    assert played.interruptions.tolist() == [0] * 10
    assert played.dollars is not None
    assert played.dollars == pytest.approx(played.minutes / 60 * 12)


@pytest.mark.parametrize("per_hour", [0.05, 0.5, 4.0])
@pytest.mark.parametrize("work", [3600, 3500, 100])
def test_the_mean_is_that_of_the_closed_form(work: float, per_hour: float) -> None:
    """Daly's, within five standard errors."""
    course = replace(HOUR, work=work)
    played = simulate(course, per_hour, runs=50_000, seed=1)
    lasts = (course.work, course.interval, course.save)
    expected = course.start + expected_seconds(*lasts, course.restart, per_hour)
    room = 5 * played.minutes.std() / math.sqrt(50_000)
    assert played.minutes.mean() == pytest.approx(expected / 60, abs=room)
    room = 5 * played.interruptions.std() / math.sqrt(50_000)
    assert played.interruptions.mean() == pytest.approx(
        expected_interruptions(*lasts, per_hour), abs=room
    )


def told_step_by_step(
    course: Course, per_hour: float, random: np.random.Generator
) -> tuple[float, int]:
    """Plays a run through, interval by interval, as one would tell its story."""
    clock, interruptions, left = course.start, 0, course.work
    until_the_next = random.exponential(3600 / per_hour)
    while left > 1e-6:
        now = min(course.interval, left)
        if now + course.save <= until_the_next:
            left -= now
            clock += now + course.save
            until_the_next -= now + course.save
        else:
            clock += until_the_next + course.restart
            until_the_next = random.exponential(3600 / per_hour)
            interruptions += 1
    return clock, interruptions


@pytest.mark.parametrize("per_hour", [0.5, 4.0])
def test_the_distribution_is_that_of_runs_told_step_by_step(per_hour: float) -> None:
    course = replace(HOUR, work=3500)
    played = simulate(course, per_hour, runs=20_000, seed=1)
    random = np.random.default_rng(2)
    told = [told_step_by_step(course, per_hour, random) for _ in range(4_000)]
    minutes = np.array([clock for clock, _ in told]) / 60
    counts = np.array([interruptions for _, interruptions in told])
    for share in (25, 50, 75, 95):
        assert np.percentile(played.minutes, share) == pytest.approx(
            np.percentile(minutes, share), rel=0.03
        )
    assert (played.interruptions == 0).mean() == pytest.approx((counts == 0).mean(), abs=0.03)


@given(
    st.floats(100, 1e5), st.floats(60, 1800), st.floats(0, 30), st.floats(0, 300), st.floats(0, 3)
)
def test_no_run_is_shorter_than_an_undisturbed_one(
    work: float, interval: float, save: float, start: float, per_hour: float
) -> None:
    course = Course(start, work, interval, save, start, None)
    played = simulate(course, per_hour, runs=50)
    assert (played.minutes >= course.undisturbed / 60 - 1e-9).all()
    quiet = played.minutes[played.interruptions == 0]
    assert quiet == pytest.approx(course.undisturbed / 60)
    assert played.dollars is None


def test_a_seed_gives_the_same_runs() -> None:
    first, again, other = (simulate(HOUR, 2, runs=100, seed=seed) for seed in (3, 3, 4))
    assert first.minutes.tolist() == again.minutes.tolist()
    assert first.minutes.tolist() != other.minutes.tolist()


def test_a_run_that_would_not_end_is_refused() -> None:
    with pytest.raises(InputError, match=r"^--interruptions 60/h: .* save more often"):
        simulate(HOUR, 60, runs=1)


def test_a_run_shorter_than_an_interval_is_not_refused_for_the_interval() -> None:
    short = replace(HOUR, work=60, interval=36_000)
    assert simulate(short, 5, runs=100).interruptions.mean() > 0


def test_json_has_means_and_percentiles() -> None:
    played = simulate(HOUR, 1, runs=1000)
    data = json.loads(json.dumps(played.as_json()))
    assert data["runs"] == 1000
    assert data["undisturbed_minutes"] == pytest.approx(62.2)
    assert data["minutes"]["p50"] == pytest.approx(np.median(played.minutes))
    assert data["minutes"]["mean"] == pytest.approx(played.minutes.mean())
    assert data["dollars"]["p95"] == pytest.approx(data["minutes"]["p95"] / 60 * 12)
    assert 0 < data["without_interruption"] < 1
    unpriced = simulate(replace(HOUR, dollars_per_hour=None), 1, runs=10)
    assert unpriced.as_json()["dollars"] is None
