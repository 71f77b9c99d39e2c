"""The checkpoint interval: against the exact expected time of a run, minimised numerically."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pitstop.core.interval import LONGEST, SHORTEST, optimal_interval

saves = st.floats(1e-3, 1e4)
mtbfs = st.floats(1, 1e7)


def expected_time(interval: np.ndarray | float, save: float, mtbf: float) -> np.ndarray | float:
    """The expected time for a second of work, restarts apart, in units of the mtbf.

    Interruptions are a Poisson process, and may come while a checkpoint is saved.
    """
    return np.expm1((interval + save) / mtbf) / interval


def best_interval(save: float, mtbf: float) -> float:
    """The minimum of `expected_time`, looked for on a finer and finer grid."""
    low, high = 1e-6 * mtbf, 2 * mtbf
    for _ in range(20):
        grid = np.geomspace(low, high, 100)
        lowest = int(np.argmin(expected_time(grid, save, mtbf)))
        low, high = float(grid[max(0, lowest - 1)]), float(grid[min(99, lowest + 1)])
    return math.sqrt(low * high)


@given(st.floats(60, 1e6), st.floats(50, 2000))
def test_the_interval_is_the_one_of_the_least_expected_time(mtbf, about):
    save = min(about**2 / (2 * mtbf), 3 * mtbf)
    best = min(max(best_interval(save, mtbf), SHORTEST), LONGEST)
    interval = optimal_interval(save, mtbf)
    assert interval == pytest.approx(best, rel=0.03 if save < mtbf else 0.07)
    least = expected_time(best, save, mtbf)
    assert expected_time(interval, save, mtbf) == pytest.approx(least, rel=0.005)


@pytest.mark.parametrize(
    ("mtbf", "published", "scale"), [(24 * 60, 117, 0.1), (6 * 60, 57, 0.1), (15, 9.1, 1)]
)
def test_it_is_what_daly_published(mtbf, published, scale):
    """Figures 3 to 5, in minutes, for a save of 5; shrunk where the interval is out of bounds."""
    seconds = 60 * scale
    interval = optimal_interval(5 * seconds, mtbf * seconds)
    assert interval == pytest.approx(published * seconds, rel=0.01)


@pytest.mark.parametrize("save", [1300, 5000, 11_000])
def test_it_is_the_time_to_an_interruption_where_a_save_takes_longer_than_that(save):
    assert optimal_interval(save, 600) == pytest.approx(best_interval(save, 600), rel=0.06)


@pytest.mark.parametrize("save", [0.2, 2, 20])
@pytest.mark.parametrize("hours", [1, 4, 20])
def test_it_is_a_little_shorter_than_youngs(save, hours):
    young = math.sqrt(2 * save * hours * 3600)
    within = min(max(young, SHORTEST), LONGEST)
    assert 0.9 * within <= optimal_interval(save, hours * 3600) <= within


@given(saves, mtbfs, st.floats(1, 100))
def test_what_costs_more_is_done_less_often(save, mtbf, times):
    assert optimal_interval(times * save, mtbf) >= optimal_interval(save, mtbf) * (1 - 1e-9)


@given(saves, mtbfs, st.floats(1, 100))
def test_the_rarer_interruptions_are_the_longer_it_is(save, mtbf, times):
    mtbf = max(mtbf, save)
    assert optimal_interval(save, times * mtbf) >= optimal_interval(save, mtbf) * (1 - 1e-9)


@given(st.just(0.0) | saves, mtbfs)
def test_it_is_between_a_minute_and_half_an_hour(save, mtbf):
    assert 60 <= optimal_interval(save, mtbf) <= 30 * 60
    assert optimal_interval(0, mtbf) == 60
    assert optimal_interval(save + 600, 1e7) == 30 * 60
