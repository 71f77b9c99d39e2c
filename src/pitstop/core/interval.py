"""How long to train from one checkpoint to the next: saving costs time, and so does lost work."""

import math

SHORTEST, LONGEST = 60.0, 30 * 60.0
"""Bounds of the interval, in seconds. A save is still being written while training goes on, and
nobody likes to lose more than half an hour, however rare that is."""

ASSUMED_SAVE_SECONDS = 1.0
"""How long training stands still for a save, as long as no save has been measured."""


def optimal_interval(save_seconds: float, mtbf_seconds: float) -> float:
    """Returns the seconds of training between two saves by which a run is expected to end first.

    J. T. Daly, "A higher order estimate of the optimum checkpoint interval for restart dumps",
    Future Generation Computer Systems 22 (2006): the perturbation solution, whose first term is
    Young's sqrt(2 x save x mtbf) (CACM 17, 1974). Restarting costs time too, but does not move the
    optimum.

    Args:
        save_seconds: how long training stands still for a save; 0 or more.
        mtbf_seconds: mean time between failures: from one interruption to the next; more than 0.

    Returns:
        within `SHORTEST` and `LONGEST`.
    """
    assert save_seconds >= 0
    assert mtbf_seconds > 0
    interval = mtbf_seconds
    if save_seconds < 2 * mtbf_seconds:
        ratio = math.sqrt(save_seconds / (2 * mtbf_seconds))
        young = math.sqrt(2 * save_seconds * mtbf_seconds)
        interval = young * (1 + ratio / 3 + ratio**2 / 9) - save_seconds
    return min(max(interval, SHORTEST), LONGEST)
