"""How many epochs a budget of minutes or dollars is good for."""

from bisect import bisect_left, bisect_right
from collections.abc import Callable
from typing import Literal

from pitstop.core.errors import InputError
from pitstop.core.recipe import MOST_EPOCHS, load_recipe
from pitstop.core.timeline import Timeline
from pitstop.plan.cost import IMAGENET, Estimate

FAST = "fast"
"""The recipe whose accuracy is published for many numbers of epochs."""

PARTS = 100
"""Epochs are solved for in so many parts of one."""

Unit = Literal["minutes", "dollars"]


def epochs_within(limit: float, cost: Callable[[float], float], *, unit: Unit) -> float:
    """Returns the most epochs whose cost is within `limit`, in hundredths; at least one.

    Args:
        limit: in `unit`.
        cost: of a run of so many epochs, in `unit`; it grows with them. Raises InputError where
            the recipe's absolute durations do not fit into the epochs.
        unit: also the name of the option in messages.

    Raises:
        InputError: not even the fewest epochs fit, or the recipe has no other number of epochs.
    """
    if not limit > 0:
        raise InputError(f"--{unit} {limit:g}: must be more than 0")
    fewest = _fewest(cost, unit)
    least = cost(fewest)
    if least > limit:
        raise InputError(
            f"--{unit} {limit:g}: too little: the least, {_epochs(fewest)}, comes to "
            f"{in_words(least, unit)}"
        )
    candidates = range(fewest * PARTS, MOST_EPOCHS * PARTS + 1)
    more = bisect_right(candidates, limit, lo=1, key=lambda parts: cost(parts / PARTS))
    return candidates[more - 1] / PARTS


def estimate_within(limit: float, at: Callable[[float], Estimate], *, unit: Unit) -> Estimate:
    """Returns the estimate of the run of the most epochs that a budget is good for.

    Args:
        limit: in `unit`.
        at: the estimate of a run of so many epochs.

    Raises:
        InputError: as `epochs_within`; or dollars are asked for, and the price is not known.
    """

    def cost(epochs: float) -> float:
        estimate = at(epochs)
        amount = estimate.minutes if unit == "minutes" else estimate.dollars
        if amount is None:
            raise InputError(
                f"the price of {estimate.machine.name} is not known: give --minutes, or see "
                "`pitstop prices`"
            )
        return amount

    return at(epochs_within(limit, cost, unit=unit))


def fast_for_as_much(run: Estimate, at: Callable[[Timeline], Estimate]) -> Estimate | None:
    """Returns the estimate of `fast`, ImageNet's published best, for as long as another run takes.

    Args:
        at: the estimate of a plan, on the same machines.

    Returns:
        None where the run is of other data, or is itself `fast`; where the least that `fast` takes
        is more, and where nothing is known of its model.
    """
    images = run.timeline.num_samples
    if images != IMAGENET or run.timeline.recipe.name == FAST:
        return None

    def of(epochs: float) -> Estimate:
        return at(Timeline.planned(load_recipe(FAST, {"epochs": epochs}), images))

    try:
        return estimate_within(run.minutes, of, unit="minutes")
    except InputError:
        return None


def in_words(amount: float, unit: Unit) -> str:
    """Returns an amount as people write it: `12.3 min`, `$8.25`."""
    if unit == "dollars":
        return f"${amount:,.2f}"
    return f"{amount:,.1f} min" if amount >= 10 else f"{amount:.2g} min"


def _fewest(cost: Callable[[float], float], unit: Unit) -> int:
    """Returns the fewest whole epochs into which the recipe's absolute durations fit."""

    def fits(epochs: int) -> bool:
        try:
            cost(epochs)
        except InputError:
            return False
        return True

    if fits(1):
        return 1
    try:
        cost(MOST_EPOCHS)
    except InputError as error:
        raise InputError(f"--{unit}: {error}") from None
    return bisect_left(range(MOST_EPOCHS), True, lo=1, key=fits)


def _epochs(count: int) -> str:
    return "1 epoch" if count == 1 else f"{count:,} epochs"
