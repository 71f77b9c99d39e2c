"""The closed form: against a plain simulation, and against the best interval."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pitstop.core.interval import LONGEST, SHORTEST, optimal_interval
from pitstop.plan.interruptions import expected_interruptions, expected_seconds, saves

works = st.floats(60, 1e5)
intervals = st.floats(30, 5000)
rates = st.just(0.0) | st.floats(1e-6, 5)


def play(work: float, interval: float, save: float, restart: float, rate: float) -> tuple:
    """Returns the time and the interruptions of one run, moment by moment."""
    rng = np.random.default_rng(play.seed)
    play.seed += 1
    clock, left, count = 0.0, work, 0
    until = rng.exponential(3600 / rate)
    while left > 0:
        piece = min(interval, left)
        if until >= piece + save:
            clock, until, left = clock + piece + save, until - piece - save, left - piece
        else:
            clock, count = clock + until + restart, count + 1
            until = rng.exponential(3600 / rate)
    return clock, count


play.seed = 0


@pytest.mark.parametrize(
    ("work", "interval", "save", "restart", "rate"),
    [(3600, 600, 5, 300, 0.5), (5000, 900, 20, 120, 3), (1000, 1800, 1, 60, 1)],
)
def test_it_is_the_mean_of_runs_that_are_played_through(work, interval, save, restart, rate):
    runs = np.array([play(work, interval, save, restart, rate) for _ in range(4000)])
    errors = runs.std(axis=0) / math.sqrt(len(runs))
    assert abs(runs[:, 0].mean() - expected_seconds(work, interval, save, restart, rate)) < (
        4 * errors[0]
    )
    assert abs(runs[:, 1].mean() - expected_interruptions(work, interval, save, rate)) < (
        4 * errors[1]
    )


@given(works, intervals, st.floats(0, 100))
def test_a_machine_that_stays_takes_the_work_and_the_saves(work, interval, save):
    expected = work + math.ceil(work / interval) * save
    assert expected_seconds(work, interval, save, 300, 0) == pytest.approx(expected)
    assert expected_seconds(work, interval, save, 300, 1e-9) == pytest.approx(expected, rel=1e-5)
    assert expected_interruptions(work, interval, save, 0) == 0


@given(works, intervals, rates, rates)
def test_more_interruptions_cost_more(work, interval, one, other):
    low, high = sorted((one, other))
    cost = [expected_seconds(work, interval, 1, 60, rate) for rate in (low, high)]
    assert cost[0] <= cost[1] * (1 + 1e-9)


@given(st.floats(0.02, 2), st.floats(0.5, 60), st.floats(0.2, 5))
def test_no_other_interval_is_better_than_the_optimal_one(rate, save, other):
    best = optimal_interval(save, 3600 / rate)
    if not SHORTEST < best < LONGEST:
        return
    cost = [
        expected_seconds(1000 * interval, interval, save, 0, rate) / (1000 * interval)
        for interval in (best, best * other)
    ]
    assert cost[0] <= cost[1] * 1.001


def test_saves_come_after_each_interval_and_at_the_end():
    assert [saves(work, 10) for work in (1, 10, 10.1, 30)] == [1, 1, 2, 3]


def test_what_never_ends_is_infinite():
    assert expected_seconds(1e9, 1e9, 1, 1, 1000) == math.inf
