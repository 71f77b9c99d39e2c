"""Plays a run through many times, on machines that are taken away at random moments.

What `plan/interruptions.py` says of the mean in closed form is here a distribution: of time, of
cost and of how often the machine goes.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pitstop.core.errors import InputError
from pitstop.plan.cost import Estimate

LEAST_CHANCE = 1e-3
"""That a machine stays for one interval; with less, a run is not expected to end."""

SHARES = (5, 25, 50, 75, 95)
"""Percentiles that are told."""


@dataclass(frozen=True)
class Course:
    """What a run does between its start and its end, in seconds; nothing of it is random.

    After `start` come intervals of work with a save after each; the last one is as long as there
    is work left. An interruption loses the interval and takes `restart`.
    """

    start: float
    """From the first paid second to the first step."""
    work: float
    """Training, evaluation and compilation, undisturbed."""
    interval: float
    """Of work, from one save to the next."""
    save: float
    """Training stands still so long for a save."""
    restart: float
    """From an interruption until training goes on."""
    dollars_per_hour: float | None
    """Of all nodes; None where the price is not known."""

    def __post_init__(self) -> None:
        assert min(self.work, self.interval) > 0
        assert min(self.start, self.save, self.restart) >= 0

    @classmethod
    def of(cls, estimate: Estimate) -> "Course":
        """Returns what a run is expected to do."""
        return cls(
            start=estimate.preparation.value + estimate.startup.value,
            work=estimate.work_seconds,
            interval=estimate.interval_seconds,
            save=estimate.save.value,
            restart=estimate.restart.value,
            dollars_per_hour=estimate.dollars_per_hour,
        )

    @property
    def intervals(self) -> int:
        """How many intervals the work takes."""
        return max(1, math.ceil(self.work / self.interval - 1e-9))

    @property
    def undisturbed(self) -> float:
        """Seconds of a run that is not interrupted."""
        return self.start + self.work + self.intervals * self.save


@dataclass(frozen=True)
class Simulation:
    """What became of each run; the arrays have an entry a run."""

    course: Course
    interruptions_per_hour: float
    minutes: NDArray[np.float64]
    """From the first paid second to the last save."""
    dollars: NDArray[np.float64] | None
    """None where the price is not known."""
    interruptions: NDArray[np.int64]

    def as_json(self) -> dict[str, Any]:
        """Returns means and percentiles (`p50` is the median) as plain data."""
        return {
            "runs": len(self.minutes),
            "interruptions_per_hour": self.interruptions_per_hour,
            "checkpoint_minutes": self.course.interval / 60,
            "undisturbed_minutes": self.course.undisturbed / 60,
            "minutes": summary(self.minutes),
            "dollars": None if self.dollars is None else summary(self.dollars),
            "interruptions": summary(self.interruptions),
            "without_interruption": float((self.interruptions == 0).mean()),
        }


def summary(values: NDArray[Any]) -> dict[str, float]:
    """Returns the mean and the percentiles `SHARES`, as `mean`, `p5`, ... `p95`."""
    places: list[float] = np.percentile(values, SHARES).tolist()
    told = {f"p{share}": place for share, place in zip(SHARES, places, strict=True)}
    return {"mean": float(values.mean()), **told}


def simulate(
    course: Course, interruptions_per_hour: float, *, runs: int, seed: int = 0
) -> Simulation:
    """Plays a run through.

    Interruptions are a Poisson process while there is work, and come without a notice: what was
    done since the last complete save is done again. This is the model of `expected_seconds`.

    Args:
        interruptions_per_hour: of all nodes together: one that goes ends the attempt of all.
        runs: how often.
        seed: of the random numbers.

    Raises:
        InputError: at so many interruptions hardly any attempt lives to its first save.
    """
    assert runs >= 1
    rate = interruptions_per_hour / 3600
    _refuse_what_never_ends(course, interruptions_per_hour)
    seconds, interruptions = _play(course, rate, runs, np.random.default_rng(seed))
    hourly = course.dollars_per_hour
    return Simulation(
        course=course,
        interruptions_per_hour=interruptions_per_hour,
        minutes=seconds / 60,
        dollars=None if hourly is None else seconds / 3600 * hourly,
        interruptions=interruptions,
    )


def _refuse_what_never_ends(course: Course, interruptions_per_hour: float) -> None:
    needed = min(course.interval, course.work) + course.save
    if math.exp(-interruptions_per_hour / 3600 * needed) < LEAST_CHANCE:
        raise InputError(
            f"--interruptions {interruptions_per_hour:g}/h: less than 1 attempt in "
            f"{1 / LEAST_CHANCE:,.0f} would last for the {needed / 60:.1f} min to its first save, "
            "so the run would not end: save more often (checkpoint.every)"
        )


def _play(
    course: Course, rate: float, runs: int, random: np.random.Generator
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Returns the seconds and the interruptions of each run; `rate` is a second's."""
    seconds = np.full(runs, course.start, dtype=np.float64)
    saved = np.zeros(runs, dtype=np.int64)  # intervals
    interruptions = np.zeros(runs, dtype=np.int64)
    going = np.arange(runs)
    while len(going):
        left = _seconds_left(course, saved[going])
        lasts = random.exponential(1 / rate, len(going)) if rate else np.full(len(going), np.inf)
        seconds[going] += np.minimum(lasts, left)
        going, lasts = going[lasts < left], lasts[lasts < left]
        saved[going] += (lasts // (course.interval + course.save)).astype(np.int64)
        interruptions[going] += 1
        seconds[going] += course.restart
    return seconds, interruptions


def _seconds_left(course: Course, saved: NDArray[np.int64]) -> NDArray[np.float64]:
    """Returns how long it takes from so many saved intervals to the end, undisturbed."""
    return course.work - saved * course.interval + (course.intervals - saved) * course.save
